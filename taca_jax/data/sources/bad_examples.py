"""Counts examples that cannot be used, names them in the log, and stops when they are too many."""

import logging
import re
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np

from taca_jax.errors import UserError

_LEAST_READ = 50  # before so many are read, the share of bad ones says little
_NAMED = 3  # examples, in a message about many
_REASONS = 5  # in a summary

_log = logging.getLogger(__name__)


class BadExampleError(Exception):
    """This example cannot be used; it has been counted and logged. Others can be."""


class NoCaptionError(BadExampleError):
    """This example has no caption, and may be given one (`data.caption`)."""


class _IndexSet:
    """A set of indices below `total`, a bit each."""

    def __init__(self, total: int):
        self._bits = np.zeros(-(-total // 8), np.uint8)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, index: int) -> bool:
        """Adds an index; returns whether it is new."""
        byte, bit = index >> 3, np.uint8(1 << (index & 7))
        if self._bits[byte] & bit:
            return False
        self._bits[byte] |= bit
        self._count += 1
        return True


class BadExamples:
    """Counts the examples that cannot be used, each once, and raises when they are too many.

    Too many is more than `max_share` of all examples, or all of them; or, long before all are read,
    more of those read so far than chance explains if `max_share` of all are bad. Threads may share
    an instance.
    """

    def __init__(self, total: int, max_share: float):
        """`total` counts all examples, also those that `add_unlisted` will be told of."""
        self.total = total
        self.max_share = max_share
        self._unlisted = 0
        self._bad = _IndexSet(total)
        self._read = _IndexSet(total)
        self._reasons: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many bad ones there are so far."""
        return self._unlisted + len(self._bad)

    def add_good(self, index: int) -> None:
        """Example `index` was read."""
        with self._lock:
            self._read.add(index)

    def add_bad(self, index: int, name: str, reason: str) -> None:
        """Example `index` could not be read. Raises UserError when that makes too many."""
        with self._lock:
            self._read.add(index)
            if self._bad.add(index):
                self._reasons[_kind(reason)] += 1
                _log.warning("skipped %s: %s (%d bad so far)", name, reason, self.count)
            self._check(name, reason)

    def add_unlisted(self, where: str, found: dict[str, list[str]]) -> None:
        """Counts what the source at `where` found bad as it was opened, and so gave no index.

        found: the names by the reason. Raises UserError when there are too many.
        """
        for reason, names in found.items():
            self._unlisted += len(names)
            self._reasons[reason] += len(names)
            _log.warning("%s: skipped %d: %s: %s", where, len(names), reason, _some(names))
        for reason, names in found.items():
            self._check(f"{where}/{names[0]}", reason)

    def summary(self) -> str | None:
        """A line on how many were skipped and why, frequent reasons first; None if none were."""
        if not self.count:
            return None
        said = [f"{count} {reason}" for reason, count in self._reasons.most_common(_REASONS)]
        more = len(self._reasons) - len(said)
        said += [f"{more} other reasons"] if more else []
        return f"skipped {self.count} of {self.total} pictures: {'; '.join(said)}"

    def _check(self, name: str, reason: str) -> None:
        """Raises UserError, with `name` and `reason` as an instance, when there are too many."""
        share = self.max_share
        bad, read = len(self._bad), len(self._read)
        # Three standard deviations above the mean: a source within the share hardly ever has more.
        usual = share * read + 3 * (share * read) ** 0.5
        if self.count > share * self.total or self.count == self.total:
            seen = f"{self.count} of {self.total}"
        elif read >= _LEAST_READ and bad > usual:
            seen = f"{bad} of the first {read}"
        else:
            return
        raise UserError(
            f"{seen} pictures cannot be used, more than data.max_bad_share={share:g} allows (such "
            f"as {name}: {reason}): repair or remove them, or raise data.max_bad_share"
        )


def _some(names: Sequence[str]) -> str:
    """The first few of `names`."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _kind(reason: str) -> str:
    """A reason without its numbers, which differ from file to file."""
    return re.sub(r"(?<!UTF-)\d+", "N", reason)
