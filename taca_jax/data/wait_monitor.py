"""Warns when training has waited long for its input, and names what is being read."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

WARN_SECONDS = 30.0
"""A wait of so many seconds is worth a warning; the next comes after twice as long, and so on."""

_CHECKS_PER_WAIT = 10
_NAMED = 3  # of what is being read, in a warning

_log = logging.getLogger(__name__)


class WaitMonitor:
    """Watches one consumer of data, and the threads that read the data for it.

    While the consumer waits, a thread of the monitor's own logs the warnings, so that they come
    even if all the others hang.
    """

    def __init__(self, seconds: float = WARN_SECONDS):
        """The first warning comes after a wait of `seconds`."""
        self._seconds = seconds
        self._reading: dict[int, tuple[str, float]] = {}  # thread -> what, since when
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="wait monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the monitor."""
        self._closed.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the consumer waits for data."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """A context in which the current thread reads `what`."""
        thread = threading.get_ident()
        self._reading[thread] = (what, time.monotonic())
        try:
            yield
        finally:
            del self._reading[thread]

    def _watch(self) -> None:
        wait, limit = None, self._seconds
        while not self._closed.wait(self._seconds / _CHECKS_PER_WAIT):
            since = self._since
            if since is None or since != wait:
                wait, limit = since, self._seconds
            elif (waited := time.monotonic() - since) >= limit:
                limit = 2 * waited
                _log.warning("no data for %.0f s: waiting for %s", waited, self._being_read())

    def _being_read(self) -> str:
        """What is being read, the longest first, in words."""
        now = time.monotonic()
        under_way = sorted(self._reading.copy().values(), key=lambda each: each[1])
        if not under_way:
            return "the reading threads, none of which is reading: the machine has no time for them"
        named = [f"{what} (read for {now - since:.0f} s)" for what, since in under_way[:_NAMED]]
        return ", ".join(named) + (", ..." if len(under_way) > _NAMED else "")
