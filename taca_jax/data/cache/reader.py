"""Reads a cache: its examples, its buckets, and batches of them."""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypedDict

import ml_dtypes
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from taca_jax.data.cache.files import EMPTY, RECORDS, damaged_shard, not_opened, read_sizes, shards
from taca_jax.data.cache.manifest import Manifest
from taca_jax.data.cache.prompts import read_prompts
from taca_jax.data.cache.writer import Caption
from taca_jax.data.config import DataConfig
from taca_jax.data.loader import DROPPED, Loader
from taca_jax.data.order import Bucket, Stream
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.threads import usable_cores
from taca_jax.errors import UserError
from taca_jax.storage.places import Place

_READ = "readahead_buffer_size:0"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_MAX_THREADS, _MOST_PER_CHUNK = 4, 16
_MOST_OPEN = 64  # shards; a process may open 1024 files by default, and there may be more shards
_REFUSED = re.compile(r"\w+\(\) failed")
"""How ArrayRecord's errors begin if the system refuses to read, so that the file may be good."""


class CachedExample(TypedDict):
    """An example of a cache: its latents, and where its captions are."""

    id: str
    latents: np.ndarray  # [1 or 2, h, w, c]: mean, and log variance
    shard: int
    first_caption: int  # its record in the shard; the others follow
    captions: int  # how many


class Cache:
    """The encoded examples of a complete cache, by their index in the source.

    Examples that were bad when the cache was made raise BadExampleError, as from the source itself:
    a run reads the same examples in the same order from either.
    """

    def __init__(self, folder: Place, manifest: Manifest):
        """Raises UserError where files are missing or damaged."""
        self.manifest = manifest
        self._folder = folder
        found = shards(folder)
        self._paths = [path for path, _ in found]
        self._index = [index for _, index in found]
        self._sizes = read_sizes(folder)
        try:
            self._empty = self._caption((folder / EMPTY).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}); remove it to encode anew") from error
        # Of each example its shard, and its row in the shard's index.
        self._place = np.full((len(self._sizes), 2), -1, np.int64)
        for shard, index in enumerate(self._index):
            self._place[index["example"]] = np.stack(
                [np.full(len(index), shard), np.arange(len(index))], 1
            )
        self._readers: OrderedDict[int, Any] = OrderedDict()  # by shard, the last used at the end
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> CachedExample:
        """Raises BadExampleError where it was bad when the cache was made."""
        shard, number = map(int, self._place[index])
        if shard < 0:
            raise BadExampleError("bad when the cache was made")
        row = self._index[shard][number]
        side, other = self._sizes[index] // self.manifest.downscale
        shape = (int(side), int(other), self.manifest.channels)
        dtype = _DTYPES[self.manifest.latents_dtype]
        content = np.frombuffer(self._read(shard, int(row["record"])), dtype)
        return {
            "id": row["name"].decode(),
            "latents": content.reshape(-1, *shape),
            "shard": shard,
            "first_caption": int(row["record"]) + 1,
            "captions": int(row["captions"]),
        }

    def caption(self, example: CachedExample, number: int) -> Caption:
        """The embeddings of caption `number` of an example; for DROPPED, of the empty caption."""
        if number == DROPPED:
            return self._empty
        return self._caption(self._read(example["shard"], example["first_caption"] + number))

    def prompts(self) -> dict[str, Caption]:
        """The embeddings of the prompts that were encoded to draw samples of."""
        return read_prompts(self._folder)

    @property
    def empty(self) -> Caption:
        """The embeddings of the empty caption."""
        return self._empty

    def buckets(self) -> list[Bucket]:
        """The buckets that the cache was made with."""
        return read_buckets(self._folder, self.manifest)

    def _caption(self, record: bytes) -> Caption:
        text, pooled = self.manifest.text, self.manifest.pooled
        dtype = _DTYPES[self.manifest.dtype]
        count = int(np.prod(text))
        return {
            "txt": np.frombuffer(record, dtype, count).reshape(text),
            "pooled": np.frombuffer(record, np.float32, offset=count * dtype.itemsize).reshape(
                pooled
            ),
        }

    def _read(self, shard: int, record: int) -> bytes:
        path = self._paths[shard]
        try:
            return self._reader(shard).read([record])[0]
        except (RuntimeError, IndexError, ValueError) as error:  # ArrayRecord's, for damaged files
            with self._lock:
                self._readers.pop(shard, None)  # it would raise the same error again and again
            reason = str(error).partition(";")[0]
            if _REFUSED.match(reason):  # a reader opens its file when it first reads
                raise not_opened(path / RECORDS, reason) from error
            raise damaged_shard(path, reason) from error

    def _reader(self, shard: int) -> Any:
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                path = str(self._paths[shard] / RECORDS)
                reader = array_record_module.ArrayRecordReader(path, _READ)
            self._readers[shard] = reader
            if len(self._readers) > _MOST_OPEN:  # closed once no thread reads from it any more
                self._readers.popitem(last=False)
            return reader


def read_buckets(folder: Place, manifest: Manifest) -> list[Bucket]:
    """The buckets that `write_sizes` was given. Raises UserError where the file is damaged."""
    sizes = read_sizes(folder)
    starts = np.cumsum([0, *manifest.sources])
    used = np.flatnonzero(sizes.min(1))
    found, which = np.unique(sizes[used], axis=0, return_inverse=True)
    buckets = []
    for number, (height, width) in enumerate(found.tolist()):
        members = used[which.reshape(-1) == number]
        parts = np.split(members, np.searchsorted(members, starts[1:-1]))
        buckets.append(Bucket((height, width), tuple(parts)))
    return buckets


def make_cached_loader(
    cache: Cache,
    *,
    data: DataConfig,
    rows: Sequence[int] | np.ndarray | None = None,
    buckets: Sequence[Bucket] | None = None,
    together: int = 1,
) -> Loader:
    """Endless batches of the encoded examples, as `make_loader` gives them of a source.

    A batch has `mean`, and for data.latents=sample `logvar`, of the latents, [b, h, w, c]; the
    captions' embeddings `txt`, [b, t, k], and `pooled`, [b, p]; and `id`. rows, together: as for
    `make_loader`. buckets: the cache's own, or parts of them; by default all.
    """

    def finish(examples: list[CachedExample], numbers: list[int]) -> dict[str, np.ndarray]:
        arrays = {"mean": np.stack([example["latents"][0] for example in examples])}
        for i, (example, number) in enumerate(zip(examples, numbers, strict=True)):
            # Record by record, so that each takes the memory of the one before: new pages of memory
            # cost more time than copying.
            text = cache.caption(example, number)
            for name, array in (("txt", text["txt"]), ("pooled", text["pooled"])):
                if i == 0:
                    arrays[name] = np.empty((len(examples), *array.shape), array.dtype)
                arrays[name][i] = array
        if data.latents == "sample":
            arrays["logvar"] = np.stack([example["latents"][1] for example in examples])
        return arrays

    ours = np.arange(data.batch_size) if rows is None else np.asarray(rows)
    stream = Stream(
        cache.buckets() if buckets is None else buckets,
        weights=data.weights,
        batch_size=data.batch_size,
        together=together,
        seed=data.seed,
    )
    return Loader(
        stream,
        lambda index, size: cache[index],
        lambda example: example["captions"],
        finish,
        size=len(cache),
        data=data,
        rows=ours,
        threads=min(usable_cores(), _MAX_THREADS),
        # A whole batch if it is not too large: to join parts of it would copy them once more.
        chunk_size=max(n for n in range(1, _MOST_PER_CHUNK + 1) if len(ours) % n == 0),
        skipped=list,
    )
