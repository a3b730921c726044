"""Batches for training: shuffled, repeated, tokenised, read ahead, and resumable exactly.

All processes share one endless stream: epoch after epoch, each a new permutation of the source.
Process p of n reads the stream's positions p, p + n, p + 2n, ... A position decides its example
and whether its caption is dropped, so the state of a loader is one number.
"""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypedDict

import grain
import numpy as np

from taca_jax.data.config import DataConfig
from taca_jax.data.sources import BadExampleError, FolderSource, Source
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

    position: int  # in the process's part of the stream
    size: int
    seed: int
    process_index: int
    process_count: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The usable examples among some neighbouring positions."""

    positions: np.ndarray  # int64 [n], rising, in the process's part of the stream
    image: np.ndarray
    tokens: np.ndarray
    id: list[str]


class Loader:
    """An endless iterator of full batches, over threads that read ahead; see `make_loader`."""

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        tokenize: Tokenize,
        process_index: int,
        process_count: int,
    ):
        self._source = source
        self._tokenize = tokenize
        self._tokenize_lock = threading.Lock()  # Rust tokenizers refuse two threads at a time
        self._seed = data.seed
        self._caption_dropout = data.caption_dropout
        self._process_index = process_index
        self._process_count = process_count
        self._batch_size = data.batch_size // process_count
        if isinstance(source, FolderSource):
            # Decoding leaves Python: small chunks spread over the cores.
            threads, self._chunk_size = min(_threads(), _MAX_THREADS), _FILES_PER_CHUNK
        else:
            # Drawing is Python: a second thread would only wait for the first.
            threads, self._chunk_size = 1, _DRAWN_PER_CHUNK
        ahead = _BATCHES_AHEAD * -(-self._batch_size // self._chunk_size)
        self._order = _Order(len(source), data.seed)
        # Grain reads ahead, by chunks: its work for an element is more than drawing one. Its own
        # shuffle takes milliseconds an index where there are few.
        chunks = grain.MapDataset.range(sys.maxsize // self._chunk_size).map(self._read)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
        self._chunks = iter(chunks.to_iter_dataset(options))
        self._chunk: _Chunk | None = None
        self._offset = 0  # in the chunk
        self._position = 0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises UserError when too many examples are bad."""
        parts: list[tuple[_Chunk, slice]] = []
        left = self._batch_size
        while left:
            chunk = self._current()
            part = slice(self._offset, min(self._offset + left, len(chunk.id)))
            parts.append((chunk, part))
            left -= part.stop - part.start
            self._offset = part.stop
            self._position = int(chunk.positions[part.stop - 1]) + 1
        return {
            "image": np.concatenate([chunk.image[part] for chunk, part in parts]),
            "tokens": np.concatenate([chunk.tokens[part] for chunk, part in parts]),
            "id": [name for chunk, part in parts for name in chunk.id[part]],
        }

    def get_state(self) -> LoaderState:
        """The state after the last batch given; what was read ahead does not matter."""
        return {
            "position": self._position,
            "size": len(self._source),
            "seed": self._seed,
            "process_index": self._process_index,
            "process_count": self._process_count,
        }

    def set_state(self, state: LoaderState) -> None:
        """Goes on where `state` was taken. Raises UserError if that was of other data."""
        now = self.get_state()
        for name, value in now.items():
            if name != "position" and state.get(name) != value:
                raise UserError(
                    f"the checkpoint's data had {name}={state.get(name)}, now it is {value}: "
                    "resume with the same data, or start a new run from the checkpoint's weights"
                )
        self._position = int(state["position"])
        self._chunk = None
        self._chunks.set_state({"next_index": self._position // self._chunk_size})

    def close(self) -> None:
        """Ends reading ahead."""
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
        while self._chunk is None or self._offset == len(self._chunk.id):
            self._chunk = next(self._chunks)
            self._offset = int(np.searchsorted(self._chunk.positions, self._position))
        return self._chunk

    def _read(self, number: int) -> _Chunk:
        """Runs on the reading threads."""
        positions = number * self._chunk_size + np.arange(self._chunk_size)
        stream = positions * self._process_count + self._process_index
        examples, kept = [], []
        for i, index in enumerate(self._order.indices(stream)):
            try:
                examples.append(self._source[index])
            except BadExampleError:  # the source has counted and logged it
                continue
            kept.append(i)
        if not examples:
            return _Chunk(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), [])
        dropped = _uniform(stream[kept], self._seed, _CAPTIONS) < self._caption_dropout
        captions = [
            "" if drop else example["caption"]
            for example, drop in zip(examples, dropped, strict=True)
        ]
        with self._tokenize_lock:
            tokens = np.asarray(self._tokenize(captions), np.int32)
        image = np.stack([example["image"] for example in examples])
        return _Chunk(positions[kept], image, tokens, [example["id"] for example in examples])


def make_loader(
    source: Source,
    *,
    data: DataConfig,
    tokenize: Tokenize,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Endless batches of `data.batch_size / process_count` examples of `source`, always full.

    tokenize: captions -> int32 [n, length]; called on many captions at a time, by one thread at a
      time.
    Raises UserError for an empty source and a batch that the processes cannot share evenly.
    """
    if len(source) == 0:
        raise UserError(f"data.source={data.source} has no examples")
    if data.batch_size % process_count:
        raise UserError(
            f"data.batch_size is {data.batch_size}; {process_count} processes share it, so it must "
            f"be a multiple of {process_count}"
        )
    return Loader(source, data, tokenize, process_index, process_count)


class _Order:
    """The order of the endless stream: each epoch a permutation by its own random numbers."""

    def __init__(self, size: int, seed: int):
        self._size = size
        self._seed = seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def indices(self, stream: np.ndarray) -> list[int]:
        """The source's index at each of some neighbouring places of the stream."""
        epochs, within = np.divmod(stream, self._size)
        starts = np.flatnonzero(np.diff(epochs, prepend=-1))
        parts = np.split(within, starts[1:])
        found = [self._epoch(int(epochs[at]))[part] for at, part in zip(starts, parts, strict=True)]
        return np.concatenate(found).tolist()

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
