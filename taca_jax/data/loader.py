"""Batches for training: shuffled, repeated, tokenised, read ahead, and resumable exactly.

All processes share one endless stream: epoch after epoch, each a new permutation of the source. A
batch is the stream's next places, and each process reads those rows of it that its devices hold. A
place alone decides its example and whether its caption is dropped: the batches are the same however
many processes read them, and the state of a loader is one number.
"""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypedDict

import grain
import numpy as np

from taca_jax.data.config import DataConfig
from taca_jax.data.sources import BadExampleError, Example, FolderSource, Source
from taca_jax.data.stalls import StallWatch
from taca_jax.errors import UserError

Tokenize = Callable[[list[str]], np.ndarray]

_MAX_THREADS = 16
_FILES_PER_CHUNK = 4
_DRAWN_PER_CHUNK = 64
_BATCHES_AHEAD = 2
_SHUFFLE, _CAPTIONS = 0, 1  # what random numbers are for


class Batch(TypedDict):
    image: np.ndarray  # uint8 [b, resolution, resolution, 3]
    tokens: np.ndarray  # int32 [b, length]
    id: list[str]


class LoaderState(TypedDict):
    """Where a loader is; plain numbers, for a checkpoint. All but `position` must stay."""

    position: int  # in the stream, of the next batch's first row
    size: int
    seed: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some neighbouring examples of this process's part of the stream."""

    image: np.ndarray
    tokens: np.ndarray
    id: list[str]


class Loader:
    """An endless iterator of full batches, over threads that read ahead; see `make_loader`."""

    def __init__(self, source: Source, data: DataConfig, tokenize: Tokenize, rows: np.ndarray):
        self._source = source
        self._stalls = StallWatch()
        self._tokenize = tokenize
        self._tokenize_lock = threading.Lock()  # Rust tokenizers refuse two threads at a time
        self._seed = data.seed
        self._caption_dropout = data.caption_dropout
        self._batch_size = data.batch_size
        self._rows = rows
        if isinstance(source, FolderSource):
            # Decoding leaves Python: small chunks spread over the cores.
            threads, self._chunk_size = min(_threads(), _MAX_THREADS), _FILES_PER_CHUNK
        else:
            # Drawing is Python: a second thread would only wait for the first.
            threads, self._chunk_size = 1, _DRAWN_PER_CHUNK
        ahead = _BATCHES_AHEAD * -(-len(rows) // self._chunk_size)
        self._order = _Order(len(source), data.seed)
        # Grain reads ahead, by chunks: its work for an element is more than drawing one. Its own
        # shuffle takes milliseconds an index where there are few.
        chunks = grain.MapDataset.range(sys.maxsize // self._chunk_size).map(self._read)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
        self._chunks = iter(chunks.to_iter_dataset(options))
        self._chunk: _Chunk | None = None
        self._offset = 0  # in the chunk
        self._batches = 0  # given so far

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
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
        return {
            "image": np.concatenate([chunk.image[part] for chunk, part in parts]),
            "tokens": np.concatenate([chunk.tokens[part] for chunk, part in parts]),
            "id": [name for chunk, part in parts for name in chunk.id[part]],
        }

    def get_state(self) -> LoaderState:
        """The state after the last batch given; the same in every process."""
        return {
            "position": self._batches * self._batch_size,
            "size": len(self._source),
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
        places = batches * self._batch_size + self._rows[rows]
        examples = [self._example(int(place)) for place in places]
        dropped = _uniform(places, self._seed, _CAPTIONS) < self._caption_dropout
        captions = [
            "" if drop else example["caption"]
            for example, drop in zip(examples, dropped, strict=True)
        ]
        with self._tokenize_lock:
            tokens = np.asarray(self._tokenize(captions), np.int32)
        image = np.stack([example["image"] for example in examples])
        return _Chunk(image, tokens, [example["id"] for example in examples])

    def _example(self, place: int) -> Example:
        """The example at a place of the stream; instead of a bad one another of the same epoch.

        To go on with the next would move all that follow, differently in each process.
        """
        for index in self._order.at(place):
            try:
                with self._stalls.reading(f"example {index}"):
                    return self._source[index]
            except BadExampleError:  # the source has counted and logged it
                continue
        raise UserError("no example can be read")  # the source says so first, naming one


def make_loader(
    source: Source,
    *,
    data: DataConfig,
    tokenize: Tokenize,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Loader:
    """Endless batches of `data.batch_size` examples of `source`, always full.

    tokenize: captions -> int32 [n, length]; called on many captions at a time, by one thread at a
      time.
    rows: which of a batch's rows this process reads (`sharding.local_rows`), rising; else all.
    Raises UserError for an empty source.
    """
    if len(source) == 0:
        raise UserError(f"data.source={data.source} has no examples")
    ours = np.arange(data.batch_size) if rows is None else np.asarray(rows)
    return Loader(source, data, tokenize, ours)


class _Order:
    """The order of the endless stream: each epoch a permutation by its own random numbers."""

    def __init__(self, size: int, seed: int):
        self._size = size
        self._seed = seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, place: int) -> Iterator[int]:
        """The source's index at a place of the stream, then those to take instead of it, in turn.

        Those begin half an epoch away, and so hardly in the same batch.
        """
        epoch, within = divmod(place, self._size)
        order = self._epoch(epoch)
        yield int(order[within])
        for step in range(self._size):
            yield int(order[(within + self._size // 2 + step) % self._size])

    def _epoch(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._epochs:
                keys = _hash(np.arange(self._size), self._seed, _SHUFFLE, epoch)
                self._epochs[epoch] = np.argsort(keys, kind="stable").astype(np.uint32)
                if len(self._epochs) > 2:  # two threads may stand on either side of an end
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]


def _uniform(places: np.ndarray, *seed: int) -> np.ndarray:
    """float64 [n] in [0, 1)."""
    return (_hash(places, *seed) >> np.uint64(11)) * 2.0**-53


def _hash(places: np.ndarray, *seed: int) -> np.ndarray:
    """uint64 [n]: random bits for each place, the same in every version of NumPy.

    splitmix64 (Steele et al., 2014).
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    z = start + places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
