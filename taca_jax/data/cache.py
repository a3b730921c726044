"""Encoded examples on disk: latents and text embeddings, in ArrayRecord shards.

A cache is a folder with

- `manifest.json`: with which models and of which data it was made, and if it is complete;
- `empty.bin`: the embeddings of the empty caption, which replaces dropped ones;
- `sizes.npy`: int32 [n, 2], the (height, width) in pixels that each picture was brought to, 0 for
  examples that are left out;
- `shards/NAME/records.array_record`, and `index.npy`, which says where in it each example is.

An example is a record with its latents (mean, then log variance if the autoencoder has one), then a
record for each caption with its embeddings (of the tokens, then pooled). Arrays are stored as they
are in memory. A shard is written whole or not at all: a process that is killed loses what it has
encoded since its last whole shard.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import ml_dtypes
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from taca_jax.data.config import DataConfig
from taca_jax.data.loader import DROPPED, Loader
from taca_jax.data.order import Bucket, Stream
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.threads import usable_cores
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file, whole_folder

SHARD_BYTES = 2**30
"""A shard is full when it has so many bytes."""

_FORMAT = 1
_MANIFEST, _EMPTY, _SIZES, _SHARDS = "manifest.json", "empty.bin", "sizes.npy", "shards"
_RECORDS, _INDEX = "records.array_record", "index.npy"
_WRITE, _READ = "group_size:1,uncompressed", "readahead_buffer_size:0"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_MAX_THREADS, _MOST_PER_CHUNK = 4, 16
_MOST_OPEN = 64  # shards; a process may open 1024 files by default, and there may be more shards
_REFUSED = re.compile(r"\w+\(\) failed")
"""How ArrayRecord's errors begin if the system refuses to read, so that the file may be good."""


@dataclass(frozen=True)
class Manifest:
    """How a cache was made; it serves runs whose models and data are the same.

    made_with: the models that encoded, by part: kind, sum of the parameters, digest of the config.
    files: a digest of the names, sizes and times of the models' files, by which they are known to
      be unchanged without reading them.
    data: the fields of the data's configuration that decide the pictures (`picture_fields`).
    sources: how many examples each source has.
    dtype: of the embeddings of tokens; pooled embeddings are float32.
    latents_dtype: of the latents.
    channels, downscale: of the latents; a pixel of them is `downscale` pixels of the picture.
    moments: whether latents have a log variance; means are then not yet scaled and shifted.
    text, pooled: shapes of a caption's embeddings, [t, k] and [p].
    examples: how many were encoded, once the cache is complete.
    """

    made_with: dict[str, Any]
    files: str
    data: dict[str, Any]
    sources: list[int]
    dtype: str
    latents_dtype: str
    channels: int
    downscale: int
    moments: bool
    text: list[int]
    pooled: list[int]
    examples: int | None = None
    format: int = _FORMAT

    def write(self, folder: Path) -> None:
        with whole_file(folder / _MANIFEST) as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the cache in `folder`; None where there is no cache yet.

    Raises UserError for a folder with something else in it, and for a cache of another version.
    """
    file = folder / _MANIFEST
    if not file.is_file():
        # A process that is killed before it writes the manifest leaves these; they are replaced.
        ours = re.compile(rf"{_EMPTY}|{_SIZES}|\..+\.partial")
        if folder.is_dir() and not all(ours.fullmatch(each.name) for each in folder.iterdir()):
            raise UserError(f"{folder} is not empty and no cache; give another data.cache")
        return None
    try:
        record = json.loads(file.read_text())
        if record["format"] == _FORMAT:
            return Manifest(**record)
        reason = f"of format {record['format']}, this version reads {_FORMAT}"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"damaged: {error}"
    raise UserError(f"{file} is {reason}; remove {folder} to encode anew")


class Caption(TypedDict):
    """The embeddings of one caption: of its tokens, [t, k], and pooled, [p]."""

    txt: np.ndarray
    pooled: np.ndarray


class CachedExample(TypedDict):
    """An example of a cache: its latents, and where its captions are."""

    id: str
    latents: np.ndarray  # [1 or 2, h, w, c]: mean, and log variance
    shard: int
    first_caption: int  # its record in the shard; the others follow
    captions: int  # how many


class CacheWriter:
    """Writes one process's shards of a cache. A context manager, which ends the last shard."""

    def __init__(self, folder: Path, prefix: str, *, shard_bytes: int = SHARD_BYTES):
        """folder: of the cache. prefix: of the shards' names, a different one in each process."""
        self._folder = folder / _SHARDS
        self._prefix = prefix
        self._shard_bytes = shard_bytes
        self._rows: list[tuple[int, int, int, bytes]] = []
        self._bytes = self._records = 0
        self._number = 0
        self._open: Any = None
        self._writer: Any = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open is None:
            return
        if kind is None:
            self.finish()
            return
        with suppress(RuntimeError):  # it may be the disk that failed
            self._writer.close()
        self._open.__exit__(kind, error, traceback)

    def add(
        self,
        example: int,
        name: str,
        latents: Sequence[np.ndarray],
        captions: Sequence[Caption],
    ) -> None:
        """Writes example `example` of the source, whose name is `name`.

        latents: [h, w, c] each, the mean and, if the cache has it, the log variance. Raises
        UserError where the example cannot be written.
        """
        if self._open is None:
            self._start()
        parts = [latents, *((each["txt"], each["pooled"]) for each in captions)]
        records = [b"".join(array.tobytes() for array in part) for part in parts]
        try:
            for record in records:
                self._writer.write(record)
        except RuntimeError as error:  # how ArrayRecord reports an error of the system
            raise self._refused(error) from error
        self._rows.append((example, self._records, len(captions), name.encode()))
        self._records += len(records)
        self._bytes += sum(map(len, records))
        if self._bytes >= self._shard_bytes:
            self.finish()

    def finish(self) -> None:
        """Ends the shard, which is part of the cache from then on."""
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._refused(error) from error
        width = max(1, *(len(row[-1]) for row in self._rows))
        kind = [("example", "<i8"), ("record", "<i8"), ("captions", "<i4"), ("name", f"S{width}")]
        with (self._made / _INDEX).open("wb") as file:
            np.save(file, np.array(self._rows, kind))
        opened, self._open = self._open, None
        opened.__exit__(None, None, None)

    def _start(self) -> None:
        while (self._folder / f"{self._prefix}{self._number:06}").exists():
            self._number += 1
        path = self._folder / f"{self._prefix}{self._number:06}"
        self._open = whole_folder(path)
        self._made = self._open.__enter__()
        self._writer = array_record_module.ArrayRecordWriter(str(self._made / _RECORDS), _WRITE)
        self._rows, self._bytes, self._records = [], 0, 0

    def _refused(self, error: Exception) -> UserError:
        reason = str(error).partition(";")[0]
        return UserError(f"{self._folder} cannot be written ({reason}); make room there")


def write_empty_caption(folder: Path, caption: Caption) -> None:
    """Writes the embeddings of the empty caption, which replaces dropped ones."""
    with whole_file(folder / _EMPTY) as file:
        file.write_bytes(caption["txt"].tobytes() + caption["pooled"].tobytes())


def write_sizes(folder: Path, buckets: Sequence[Bucket], count: int, resolution: int) -> None:
    """Writes the size that each of `count` examples is brought to by its bucket.

    The pictures of a bucket without a size are squares of `resolution` pixels a side.
    """
    sizes = np.zeros((count, 2), np.int32)
    for bucket in buckets:
        sizes[np.concatenate(bucket.parts)] = bucket.size or (resolution, resolution)
    with whole_file(folder / _SIZES) as file, file.open("wb") as opened:
        np.save(opened, sizes)


def read_buckets(folder: Path, manifest: Manifest) -> list[Bucket]:
    """The buckets that `write_sizes` was given. Raises UserError where the file is damaged."""
    sizes = _read_sizes(folder)
    starts = np.cumsum([0, *manifest.sources])
    used = np.flatnonzero(sizes.min(1))
    found, which = np.unique(sizes[used], axis=0, return_inverse=True)
    buckets = []
    for number, (height, width) in enumerate(found.tolist()):
        members = used[which.reshape(-1) == number]
        parts = np.split(members, np.searchsorted(members, starts[1:-1]))
        buckets.append(Bucket((height, width), tuple(parts)))
    return buckets


def encoded(folder: Path) -> np.ndarray:
    """int64 [m], rising: the indices of the examples that are in whole shards."""
    rows = [index["example"] for _, index in _shards(folder)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))


class Cache:
    """The encoded examples of a complete cache, by their index in the source.

    Examples that were bad when the cache was made raise BadExampleError, as from the source itself:
    a run reads the same examples in the same order from either.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        """Raises UserError where files are missing or damaged."""
        self.manifest = manifest
        self._folder = folder
        found = _shards(folder)
        self._paths = [path for path, _ in found]
        self._index = [index for _, index in found]
        self._sizes = _read_sizes(folder)
        try:
            self._empty = self._caption((folder / _EMPTY).read_bytes())
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
                raise _not_opened(path / _RECORDS, reason) from error
            raise _damaged_shard(path, reason) from error

    def _reader(self, shard: int) -> Any:
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                path = str(self._paths[shard] / _RECORDS)
                reader = array_record_module.ArrayRecordReader(path, _READ)
            self._readers[shard] = reader
            if len(self._readers) > _MOST_OPEN:  # closed once no thread reads from it any more
                self._readers.popitem(last=False)
            return reader


def make_cached_loader(
    cache: Cache,
    *,
    data: DataConfig,
    rows: Sequence[int] | np.ndarray | None = None,
    together: int = 1,
) -> Loader:
    """Endless batches of the encoded examples, as `make_loader` gives them of a source.

    A batch has `mean`, and for data.latents=sample `logvar`, of the latents, [b, h, w, c]; the
    captions' embeddings `txt`, [b, t, k], and `pooled`, [b, p]; and `id`. rows, together: as for
    `make_loader`.
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
        cache.buckets(),
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


def picture_fields(data: DataConfig) -> dict[str, Any]:
    """The fields of the configuration that decide which pictures a cache holds, and their sizes."""
    return {
        "source": list(data.source),
        "resolution": data.resolution,
        "aspect": data.aspect,
        "max_aspect": data.max_aspect,
        "min_side": data.min_side,
    }


def differences(made: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The names under which two records differ, sorted."""
    return sorted(name for name in made.keys() | asked.keys() if made.get(name) != asked.get(name))


def _read_sizes(folder: Path) -> np.ndarray:
    """int32 [n, 2], see the module. Raises UserError where it cannot be read."""
    try:
        return np.load(folder / _SIZES, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}); remove it to encode anew") from error
    except OSError as error:
        raise _not_opened(folder / _SIZES, error.strerror or str(error)) from error


def _shards(folder: Path) -> list[tuple[Path, np.ndarray]]:
    """The folder and the index of each shard, in the order of their names."""
    paths = sorted(path.parent for path in (folder / _SHARDS).glob(f"[!.]*/{_INDEX}"))
    return [(path, _read_index(path)) for path in paths]


def _read_index(shard: Path) -> np.ndarray:
    try:
        return np.load(shard / _INDEX, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged_shard(shard, str(error).partition("\n")[0]) from error
    except OSError as error:
        raise _not_opened(shard / _INDEX, error.strerror or str(error)) from error


def _damaged_shard(shard: Path, reason: str) -> UserError:
    return UserError(
        f"{shard} is damaged ({reason}); remove that folder, and start again to encode what was in "
        "it"
    )


def _not_opened(file: Path, reason: str) -> UserError:
    return UserError(f"{file} cannot be opened ({reason}); see to that, and start again")
