"""Batches for training: shuffled, repeated, read ahead by threads, and exactly resumable.

All processes share one endless stream of examples (`order`). A batch is the next part of it, and
each process reads the rows of the batch that its devices hold. An example's place in the stream
alone decides which example it is, which of its captions is used, and whether that is dropped: the
batches are the same for any number of processes, and the state of a loader is one number.
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
from taca_jax.data.sources.mixing import parts_of, read_example, summaries
from taca_jax.data.sources.source import Example, PictureSource, Source, captions_of
from taca_jax.data.threads import usable_cores
from taca_jax.data.wait_monitor import WaitMonitor
from taca_jax.errors import UserError

Tokenize = Callable[[list[str]], np.ndarray]
"""Captions -> tokens, int32 [n, length]."""

Read = Callable[[int, tuple[int, int] | None], Any]
"""(index, (height, width) of its bucket) -> the example."""

Captions = Callable[[Any], int]
"""An example -> how many captions it has."""

Finish = Callable[[list[Any], list[int]], dict[str, np.ndarray]]
"""(n examples, the number of the caption to use of each, or DROPPED) -> arrays [n, ...] by name."""

DROPPED = -1
"""In place of the number of a caption: the empty caption."""

MAX_THREADS = 16
FILES_PER_CHUNK = 4
"""Examples that a thread reads at a time, where they are files."""
BATCHES_AHEAD = 2
"""Batches that are read before they are asked for."""
_DRAWN_PER_CHUNK = 64


class LoaderState(TypedDict):
    """Where a loader is, as plain numbers for a checkpoint."""

    position: int  # in the stream, of the next batch's first row
    size: int  # how many examples there are; must be the same on resumption
    seed: int  # as well


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive examples of this process's part of the stream, read by one thread."""

    arrays: dict[str, np.ndarray]  # [n, ...]
    id: list[str]


class Loader:
    """An endless iterator of full batches, which threads read ahead; made by `make_loader`.

    A batch is a dictionary of arrays [b, ...] by name, and `id`, the names of the examples. The
    loader is a context manager, which stops the threads.
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
        """stream: decides the order. read, captions, finish: make the batches, see their types.

        size: how many examples there are. rows: which rows of a batch this process reads, rising,
        int [rows]. threads: how many read. chunk_size: how many examples each reads at a time.
        skipped: gives lines on what was skipped.
        """
        self.skipped = skipped
        self._stream = stream
        self._monitor = WaitMonitor()
        self._read_one = read
        self._captions = captions
        self._finish = finish
        self._size = size
        self._seed = data.seed
        self._caption_dropout = data.caption_dropout
        self._batch_size = data.batch_size
        self._rows = rows
        if len(stream.buckets) > 1:  # a chunk's pictures have one size, so they are of one batch
            chunk_size = max(n for n in range(1, chunk_size + 1) if len(rows) % n == 0)
        self._chunk_size = chunk_size
        ahead = BATCHES_AHEAD * -(-len(rows) // chunk_size)
        # Grain reads ahead by chunks, because its own work for an element takes longer than drawing
        # one. Its shuffle is not used: it takes milliseconds an index for small data sets.
        chunks = grain.MapDataset.range(sys.maxsize // chunk_size).map(self._read)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
        self._chunks = iter(chunks.to_iter_dataset(options))
        self._chunk: _Chunk | None = None
        self._offset = 0  # in the chunk, of the next example
        self._batches = 0  # how many were given so far

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
        """The state after the last batch that was given; the same in every process."""
        return {
            "position": self._batches * self._batch_size,
            "size": self._size,
            "seed": self._seed,
        }

    def set_state(self, state: LoaderState) -> None:
        """Goes on from where `state` was taken, with this or another number of processes.

        Raises UserError for a state of other data.
        """
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
        """Stops the threads."""
        self._monitor.close()
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
            with self._monitor.waiting():
                self._chunk = next(self._chunks)
        return self._chunk

    def _read(self, number: int) -> _Chunk:
        """Chunk `number` of this process's part of the stream; called in the reading threads."""
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
        """The example at a row of a batch; if that is bad, another one of the same epoch.

        Leaving bad ones out instead would shift all that follow, differently in each process.
        """
        size = self._stream.buckets[self._stream.bucket(batch)].size
        for index in self._stream.at(batch, row):
            try:
                with self._monitor.reading(f"example {index}"):
                    return self._read_one(index, size)
            except BadExampleError:  # the source has counted and logged it
                continue
        raise UserError(
            "all examples that could be next are bad, and the log names each: repair or remove them"
        )


def make_loader(
    source: Source,
    *,
    data: DataConfig,
    tokenize: Tokenize,
    rows: Sequence[int] | np.ndarray | None = None,
    buckets: Sequence[Bucket] | None = None,
    together: int = 1,
) -> Loader:
    """Endless, full batches of `data.batch_size` examples of `source`.

    A batch has `image`, uint8 [b, height, width, 3], `tokens`, int32 [b, length], `id`, and where
    the source has them `labels`, uint8 [b, rows, columns, 3].

    tokenize: called with several captions at a time, by one thread at a time.
    rows: which rows of a batch this process reads, rising (`parallel.batches.local_rows`); by
      default all.
    buckets: from `make_buckets`; by default all pictures are as the source gives them.
    together: how many batches in a row are from one bucket.

    Raises UserError for an empty source.
    """
    if len(source) == 0:
        raise UserError(f"data.source={','.join(data.source)} has no examples")
    if buckets is None:
        buckets = [one_bucket(source)]
    lock = threading.Lock()  # tokenizers written in Rust refuse two threads at a time

    def finish(examples: list[Example], captions: list[int]) -> dict[str, np.ndarray]:
        texts = [
            "" if number == DROPPED else captions_of(example)[number]
            for example, number in zip(examples, captions, strict=True)
        ]
        with lock:
            tokens = np.asarray(tokenize(texts), np.int32)
        arrays = {"image": np.stack([example["image"] for example in examples]), "tokens": tokens}
        labels = [example["labels"] for example in examples if "labels" in example]
        return {**arrays, "labels": np.stack(labels)} if labels else arrays

    if any(isinstance(part, PictureSource) for part in parts_of(source)):
        # Decoding runs outside of Python: small chunks spread it over the cores.
        threads, chunk_size = min(usable_cores(), MAX_THREADS), FILES_PER_CHUNK
    else:
        # Drawing is Python code, which only one thread can run at a time.
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
    """A bucket of all examples, with their pictures as the source gives them."""
    starts = np.cumsum([0, *map(len, parts_of(source))])
    return Bucket(None, tuple(map(np.arange, starts[:-1], starts[1:])))


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
