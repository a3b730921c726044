"""Batches for training: shuffled, repeated, made ready, read ahead, and resumable exactly.

All processes share one endless stream: epoch after epoch, each a new permutation (`order`). A batch
is the stream's next places, and each process reads those rows of it that its devices hold. A place
alone decides its example, which of its captions is read, and whether it is dropped: the batches are
the same however many processes read them, and the state of a loader is one number.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypedDict

import grain
import numpy as np

from taca_jax.data.config import DataConfig
from taca_jax.data.order import CHOOSE, DROP, Bucket, Stream, uniform
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.base import Example, PictureSource, Source, cores
from taca_jax.data.sources.opening import parts_of, read_example, summaries
from taca_jax.data.stalls import StallWatch
from taca_jax.errors import UserError

Tokenize = Callable[[list[str]], np.ndarray]
Read = Callable[[int, tuple[int, int] | None], Any]
"""An example by index, its picture of the size of its bucket."""
Captions = Callable[[Any], int]
Finish = Callable[[list[Any], list[int]], dict[str, np.ndarray]]
"""The arrays of some examples, each with the number of its caption, or DROPPED."""

DROPPED = -1

MAX_THREADS = 16
FILES_PER_CHUNK = 4
BATCHES_AHEAD = 2
_DRAWN_PER_CHUNK = 64


class LoaderState(TypedDict):
    """Where a loader is; plain numbers, for a checkpoint. All but `position` must stay."""

    position: int  # in the stream, of the next batch's first row
    size: int
    seed: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some neighbouring examples of this process's part of the stream."""

    arrays: dict[str, np.ndarray]
    id: list[str]


class Loader:
    """An endless iterator of full batches, over threads that read ahead; see `make_loader`.

    Each is a dictionary: arrays [b, ...] by name, and `id`, the names of the examples.
    """

    def __init__(
        self,
        stream: Stream,
        read: Read,
        captions: Captions,
        finish: Finish,
        *,
        size: int,
        data: DataConfig,
        rows: np.ndarray,
        threads: int,
        chunk_size: int,
        skipped: Callable[[], list[str]],
    ):
        """size: how many examples there are, for the state. skipped: lines on what was skipped."""
        self.skipped = skipped
        self._stream = stream
        self._stalls = StallWatch()
        self._read_one = read
        self._captions = captions
        self._finish = finish
        self._size = size
        self._seed = data.seed
        self._caption_dropout = data.caption_dropout
        self._batch_size = data.batch_size
        self._rows = rows
        if len(stream.buckets) > 1:  # pictures of a chunk have one size, and so are of one batch
            chunk_size = max(n for n in range(1, chunk_size + 1) if len(rows) % n == 0)
        self._chunk_size = chunk_size
        ahead = BATCHES_AHEAD * -(-len(rows) // chunk_size)
        # Grain reads ahead, by chunks: its work for an element is more than drawing one. Its own
        # shuffle takes milliseconds an index where there are few.
        chunks = grain.MapDataset.range(sys.maxsize // chunk_size).map(self._read)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
        self._chunks = iter(chunks.to_iter_dataset(options))
        self._chunk: _Chunk | None = None
        self._offset = 0  # in the chunk
        self._batches = 0  # given so far

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, Any]:
        """This process's rows of the next batch. Raises UserError when too many are bad."""
        parts: list[tuple[_Chunk, slice]] = []
        left = len(self._rows)
        while left:
            chunk = self._current()
            part = slice(self._offset, min(self._offset + left, len(chunk.id)))
            parts.append((chunk, part))
            left -= part.stop - part.start
            self._offset = part.stop
        self._batches += 1
        batch: dict[str, Any] = {
            name: _joined([chunk.arrays[name][part] for chunk, part in parts])
            for name in parts[0][0].arrays
        }
        return {**batch, "id": [name for chunk, part in parts for name in chunk.id[part]]}

    def get_state(self) -> LoaderState:
        """The state after the last batch given; the same in every process."""
        return {
            "position": self._batches * self._batch_size,
            "size": self._size,
            "seed": self._seed,
        }

    def set_state(self, state: LoaderState) -> None:
        """Goes on where `state` was taken, by however many processes. Raises UserError if that was
        of other data."""
        now = self.get_state()
        for name, value in now.items():
            if name != "position" and state.get(name) != value:
                raise UserError(
                    f"the checkpoint's data had {name}={state.get(name)}, now it is {value}: "
                    "resume with the same data, or start a new run from the checkpoint's weights"
                )
        self._batches, odd = divmod(int(state["position"]), self._batch_size)
        if odd:
            raise UserError(
                f"the checkpoint's data stopped after {state['position']} samples, which are no "
                f"whole batches of {self._batch_size}; start a new run from its weights"
            )
        self._chunk = None
        number, self._offset = divmod(self._batches * len(self._rows), self._chunk_size)
        self._chunks.set_state({"next_index": number})

    def close(self) -> None:
        """Ends reading ahead."""
        self._stalls.close()
        self._chunks.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _current(self) -> _Chunk:
        """The chunk that holds the next example, which is at `_offset`."""
        if self._chunk is not None and self._offset == len(self._chunk.id):
            self._chunk, self._offset = None, 0
        if self._chunk is None:
            with self._stalls.waiting():
                self._chunk = next(self._chunks)
        return self._chunk

    def _read(self, number: int) -> _Chunk:
        """Runs on the reading threads."""
        ours = number * self._chunk_size + np.arange(self._chunk_size)
        batches, rows = np.divmod(ours, len(self._rows))
        rows = self._rows[rows]
        places = batches * self._batch_size + rows
        examples = [self._example(*at) for at in zip(batches.tolist(), rows.tolist(), strict=True)]
        dropped = uniform(places, self._seed, DROP) < self._caption_dropout
        drawn = uniform(places, self._seed, CHOOSE)
        captions = [
            DROPPED if drop else int(random * self._captions(example))
            for example, drop, random in zip(examples, dropped, drawn, strict=True)
        ]
        return _Chunk(self._finish(examples, captions), [example["id"] for example in examples])

    def _example(self, batch: int, row: int) -> Any:
        """The example at a place of the stream; instead of a bad one another of the same epoch.

        To go on with the next would move all that follow, differently in each process.
        """
        size = self._stream.buckets[self._stream.bucket(batch)].size
        for index in self._stream.at(batch, row):
            try:
                with self._stalls.reading(f"example {index}"):
                    return self._read_one(index, size)
            except BadExampleError:  # the source has counted and logged it
                continue
        raise UserError("no example can be read")  # the source says so first, naming one


def make_loader(
    source: Source,
    *,
    data: DataConfig,
    tokenize: Tokenize,
    rows: Sequence[int] | np.ndarray | None = None,
    buckets: Sequence[Bucket] | None = None,
    together: int = 1,
) -> Loader:
    """Endless batches of `data.batch_size` examples of `source`, always full: `image` uint8
    [b, height, width, 3], `tokens` int32 [b, length].

    tokenize: captions -> int32 [n, length]; called on many captions at a time, by one thread at a
      time.
    rows: which of a batch's rows this process reads (`sharding.local_rows`), rising; else all.
    buckets: what `make_buckets` made of the source; else all pictures are as it gives them.
    together: how many batches in a row are of one bucket.
    Raises UserError for an empty source.
    """
    if len(source) == 0:
        raise UserError(f"data.source={','.join(data.source)} has no examples")
    if buckets is None:
        buckets = [one_bucket(source)]
    lock = threading.Lock()  # Rust tokenizers refuse two threads at a time

    def finish(examples: list[Example], captions: list[int]) -> dict[str, np.ndarray]:
        texts = [
            "" if number == DROPPED else captions_of(example)[number]
            for example, number in zip(examples, captions, strict=True)
        ]
        with lock:
            tokens = np.asarray(tokenize(texts), np.int32)
        return {"image": np.stack([example["image"] for example in examples]), "tokens": tokens}

    if any(isinstance(part, PictureSource) for part in parts_of(source)):
        # Decoding leaves Python: small chunks spread over the cores.
        threads, chunk_size = min(cores(), MAX_THREADS), FILES_PER_CHUNK
    else:
        # Drawing is Python: a second thread would only wait for the first.
        threads, chunk_size = 1, _DRAWN_PER_CHUNK
    return Loader(
        Stream(
            buckets,
            weights=data.weights,
            batch_size=data.batch_size,
            together=together,
            seed=data.seed,
        ),
        lambda index, size: read_example(source, index, size),
        lambda example: len(captions_of(example)),
        finish,
        size=len(source),
        data=data,
        rows=np.arange(data.batch_size) if rows is None else np.asarray(rows),
        threads=threads,
        chunk_size=chunk_size,
        skipped=lambda: summaries(source),
    )


def one_bucket(source: Source) -> Bucket:
    """All examples, their pictures as the source gives them."""
    starts = np.cumsum([0, *map(len, parts_of(source))])
    return Bucket(None, tuple(map(np.arange, starts[:-1], starts[1:])))


def captions_of(example: Example) -> Sequence[str]:
    """All that an example has, one or several."""
    caption = example["caption"]
    return (caption,) if isinstance(caption, str) else caption


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
