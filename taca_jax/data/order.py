"""The order in which a run reads its examples: an endless stream of batches, decided by a seed.

Buckets take turns batch by batch, and the sources within a bucket example by example, both in
proportion to their shares. The examples of one bucket and source come in epochs, each a new
permutation. The example at any place is computed without those before it.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

SHUFFLE, DROP, CHOOSE = range(3)
"""What random numbers are for: the order, dropped captions, which of several captions."""

_FINEST_WEIGHT = 10**6  # the ratio of two weights is a fraction with at most this denominator


@dataclass(frozen=True)
class Bucket:
    """Examples whose pictures are all brought to one size.

    size: (height, width) in pixels; None for pictures as their source gives them. parts: for each
    of the sources that are mixed, the indices of its examples, int64 [n].
    """

    size: tuple[int, int] | None
    parts: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))


class Stream:
    """Which examples are in each batch; all of a batch are from one bucket.

    Each bucket has epochs of its own (with weights, each source within it has), in which every
    example comes once; its last batch of an epoch is filled from the next. How often a bucket comes
    is proportional to its number of examples, so that the epochs of all end at about the same time.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        weights: Sequence[float] = (),
        batch_size: int,
        together: int = 1,
        seed: int,
    ):
        """weights: how often each source is drawn from, in proportion; without any, every example
        is drawn equally often. together: how many batches in a row are from one bucket.
        """
        self.buckets = list(buckets)
        self._batch_size = batch_size
        self._together = together
        sizes = [sum(map(len, parts)) for parts in zip(*(b.parts for b in buckets), strict=True)]
        rates = [Fraction(1)] * len(sizes)
        if weights:
            rates = [
                _share(weight, max(weights)) / max(size, 1)
                for weight, size in zip(weights, sizes, strict=True)
            ]
        shares = [[r * len(p) for r, p in zip(rates, b.parts, strict=True)] for b in buckets]
        self._turns = _whole([sum(share, Fraction(0)) for share in shares])
        self._mixes = [_whole(share) for share in shares]
        self._orders = [[_Order(part, seed) for part in bucket.parts] for bucket in buckets]

    def bucket(self, batch: int) -> int:
        """The number of the bucket that a batch is from."""
        return turn(batch // self._together, self._turns)[0]

    def at(self, batch: int, row: int) -> Iterator[int]:
        """The index of the example at a row of a batch, then of substitutes should it be bad."""
        group, within = divmod(batch, self._together)
        bucket, group = turn(group, self._turns)
        place = (group * self._together + within) * self._batch_size + row
        source, place = turn(place, self._mixes[bucket])
        return self._orders[bucket][source].at(place)


def turn(place: int, shares: Sequence[int]) -> tuple[int, int]:
    """Whose turn it is at a place, i, and how many turns i has had before.

    Of the first n * sum(shares) places, i has exactly n * shares[i], evenly spread.
    """
    left = sum(shares)
    for i, share in enumerate(shares[:-1]):
        before = place * share // left
        if (place + 1) * share // left > before:
            return i, before
        place -= before
        left -= share
    return len(shares) - 1, place


def uniform(places: np.ndarray, *seed: int) -> np.ndarray:
    """float64 [n] in [0, 1): a random number for each place, decided by the seed."""
    return (_hash(places, *seed) >> np.uint64(11)) * 2.0**-53


class _Order:
    """The endless order of some examples: epochs, each a permutation of its own."""

    def __init__(self, members: np.ndarray, seed: int):
        self._members = members
        self._seed = seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, place: int) -> Iterator[int]:
        """The index of the example at a place, then of substitutes should it be bad.

        Substitutes are from half an epoch away, and so hardly ever in the same batch.
        """
        size = len(self._members)
        epoch, within = divmod(place, size)
        order = self._epoch(epoch)
        yield int(self._members[order[within]])
        for step in range(size):
            yield int(self._members[order[(within + size // 2 + step) % size]])

    def _epoch(self, epoch: int) -> np.ndarray:
        """uint32 [n]: the permutation of an epoch."""
        with self._lock:
            if epoch not in self._epochs:
                keys = _hash(self._members, self._seed, SHUFFLE, epoch)
                self._epochs[epoch] = np.argsort(keys, kind="stable").astype(np.uint32)
                if len(self._epochs) > 2:  # threads may read on both sides of an epoch's end
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]


def _share(weight: float, largest: float) -> Fraction:
    """weight / largest, with the same relative precision for small weights, and never 0."""
    return 1 / (Fraction(largest) / Fraction(weight)).limit_denominator(_FINEST_WEIGHT)


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportion as `shares`."""
    scale = lcm(*(share.denominator for share in shares))
    return [int(share * scale) for share in shares]


def _hash(places: np.ndarray, *seed: int) -> np.ndarray:
    """uint64 [n]: random bits for each place, the same in every version of NumPy.

    The generator is splitmix64 (Steele et al., OOPSLA 2014).
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    z = start + places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
