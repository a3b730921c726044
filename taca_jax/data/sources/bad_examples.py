"""Examples that cannot be used: named and counted, and too many of them."""

import logging
import re
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np

from taca_jax.errors import UserError

_LEAST_LOOKED = 50  # before fewer, a share says little
_NAMED = 3  # in messages about many
_REASONS = 5  # in a summary

_log = logging.getLogger(__name__)


class BadExampleError(Exception):
    """This example cannot be used; it has been counted and logged. Others can."""


class _Marks:
    """Which of `total` examples were marked, a bit each; `len` says how many."""

    def __init__(self, total: int):
        self._bits = np.zeros(-(-total // 8), np.uint8)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, index: int) -> bool:
        """Marks an example; whether it was not marked before."""
        byte, bit = index >> 3, np.uint8(1 << (index & 7))
        if self._bits[byte] & bit:
            return False
        self._bits[byte] |= bit
        self._count += 1
        return True


class BadExamples:
    """Counts the examples that cannot be used, each once, and says when they are too many.

    Too many are: more than `max_share` of all `total`; or, earlier, so many of those looked at that
    chance does not explain it; or all.
    """

    def __init__(self, total: int, max_share: float):
        """`total` are all that there are, with those that `listed` will count."""
        self.total = total
        self.max_share = max_share
        self._listed = 0
        self._bad = _Marks(total)
        self._looked = _Marks(total)
        self._reasons: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return self._listed + len(self._bad)

    def good(self, index: int) -> None:
        """Example `index` was read."""
        with self._lock:
            self._looked.add(index)

    def bad(self, index: int, name: str, reason: str) -> None:
        """Example `index` could not be read. Raises UserError when that makes too many."""
        with self._lock:
            self._looked.add(index)
            if self._bad.add(index):
                self._reasons[_kind(reason)] += 1
                _log.warning("skipped %s: %s (%d bad so far)", name, reason, self.count)
            self._check(name, reason)

    def listed(self, where: str, found: dict[str, list[str]]) -> None:
        """Counts what was seen to be bad before any index was given: reason -> names, in `where`.

        Raises UserError when there are too many.
        """
        for reason, names in found.items():
            self._listed += len(names)
            self._reasons[reason] += len(names)
            _log.warning("%s: skipped %d: %s: %s", where, len(names), reason, some(names))
        for reason, names in found.items():
            self._check(f"{where}/{names[0]}", reason)

    def summary(self) -> str | None:
        """A line that says how many were skipped and why, the most frequent reasons first."""
        if not self.count:
            return None
        said = [f"{count} {reason}" for reason, count in self._reasons.most_common(_REASONS)]
        more = len(self._reasons) - len(said)
        said += [f"{more} other reasons"] if more else []
        return f"skipped {self.count} of {self.total} pictures: {'; '.join(said)}"

    def _check(self, name: str, reason: str) -> None:
        """Raises UserError, giving `name` and `reason` as an instance, when there are too many."""
        share = self.max_share
        found, looked = len(self._bad), len(self._looked)
        # Three standard deviations: of a folder below the share, hardly any beginning is so bad.
        usual = share * looked + 3 * (share * looked) ** 0.5
        if self.count > share * self.total or self.count == self.total:
            seen = f"{self.count} of {self.total}"
        elif looked >= _LEAST_LOOKED and found > usual:
            seen = f"{found} of the first {looked}"
        else:
            return
        raise UserError(
            f"{seen} pictures cannot be used, more than data.max_bad_share={share:g} allows (such "
            f"as {name}: {reason}): repair or remove them, or raise data.max_bad_share"
        )


def some(names: Sequence[str]) -> str:
    """The first few of `names`."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _kind(reason: str) -> str:
    """A reason without what differs from one file to the next."""
    return re.sub(r"(?<!UTF-)\d+", "N", reason)
