"""What stands at each place of the endless stream that a run reads, decided by a seed.

Buckets take turns by batches and sources by samples, each in proportion to its share, and within a
bucket and a source each epoch is a new permutation. Every place is found without those before it.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

SHUFFLE, DROP, CHOOSE = range(3)  # what random numbers are for

_FINEST_WEIGHT = 10**6


@dataclass(frozen=True)
class Bucket:
    """Examples whose pictures are brought to one size.

    size: height and width; None for the pictures as their source gives them. parts: the indices of
    the examples, int64 [n], of each of the sources that are mixed.
    """

    size: tuple[int, int] | None
    parts: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))


class Stream:
    """The examples of each batch, which is of one bucket.

    Each bucket has epochs of its own: in each every example of it comes once (of several sources
    with weights: each source has), and its last batch goes on into its next epoch. Buckets come as
    often as they have examples, so that their epochs end within a few batches of each other.
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
        """weights: of the sources; none takes every example equally often. together: how many
        batches in a row are of one bucket."""
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
        """Which bucket a batch is of."""
        return turn(batch // self._together, self._turns)[0]

    def at(self, batch: int, row: int) -> Iterator[int]:
        """The example at a row of a batch, then those to take instead of it, in turn."""
        group, within = divmod(batch, self._together)
        bucket, group = turn(group, self._turns)
        place = (group * self._together + within) * self._batch_size + row
        source, place = turn(place, self._mixes[bucket])
        return self._orders[bucket][source].at(place)


def turn(place: int, shares: Sequence[int]) -> tuple[int, int]:
    """Whose turn it is at a place, and how many turns that one has had before.

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
    """float64 [n] in [0, 1): a random number for each place."""
    return (_hash(places, *seed) >> np.uint64(11)) * 2.0**-53


class _Order:
    """The order of some examples: each epoch a permutation by its own random numbers."""

    def __init__(self, members: np.ndarray, seed: int):
        self._members = members
        self._seed = seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, place: int) -> Iterator[int]:
        """The example at a place, then those to take instead of it, in turn.

        Those begin half an epoch away, and so hardly in the same batch.
        """
        size = len(self._members)
        epoch, within = divmod(place, size)
        order = self._epoch(epoch)
        yield int(self._members[order[within]])
        for step in range(size):
            yield int(self._members[order[(within + size // 2 + step) % size]])

    def _epoch(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._epochs:
                keys = _hash(self._members, self._seed, SHUFFLE, epoch)
                self._epochs[epoch] = np.argsort(keys, kind="stable").astype(np.uint32)
                if len(self._epochs) > 2:  # two threads may stand on either side of an end
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]


def _share(weight: float, largest: float) -> Fraction:
    """weight / largest, as precise for the smallest as for others, and never 0."""
    return 1 / (Fraction(largest) / Fraction(weight)).limit_denominator(_FINEST_WEIGHT)


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportion."""
    scale = lcm(*(share.denominator for share in shares))
    return [int(share * scale) for share in shares]


def _hash(places: np.ndarray, *seed: int) -> np.ndarray:
    """uint64 [n]: random bits for each place, the same in every version of NumPy.

    splitmix64 (Steele et al., 2014).
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    z = start + places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
