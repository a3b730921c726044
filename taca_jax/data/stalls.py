"""Says what the input pipeline waits for, when training has waited too long for it."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STALL_SECONDS = 30.0
"""After how long a wait is worth a line; the next comes after twice as long, and so on."""

_LOOKS_PER_STALL = 10
_NAMED = 3

_log = logging.getLogger(__name__)


class StallWatch:
    """Watches one consumer that waits and the threads that read for it.

    A thread of its own logs a warning when a wait goes on, though all others are stuck.
    """

    def __init__(self, seconds: float = STALL_SECONDS):
        self._seconds = seconds
        self._reading: dict[int, tuple[str, float]] = {}  # thread -> what, since when
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends watching."""
        self._closed.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The consumer waits for as long as this lasts."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """A thread reads `what` for as long as this lasts."""
        thread = threading.get_ident()
        self._reading[thread] = (what, time.monotonic())
        try:
            yield
        finally:
            del self._reading[thread]

    def _watch(self) -> None:
        wait, limit = None, self._seconds
        while not self._closed.wait(self._seconds / _LOOKS_PER_STALL):
            since = self._since
            if since is None or since != wait:
                wait, limit = since, self._seconds
            elif (waited := time.monotonic() - since) >= limit:
                limit = 2 * waited
                _log.warning("no data for %.0f s: waiting for %s", waited, self._waited_for())

    def _waited_for(self) -> str:
        """What has been read for longest."""
        now = time.monotonic()
        under_way = sorted(self._reading.copy().values(), key=lambda each: each[1])
        if not under_way:
            return "the reading threads, none of which is reading: the machine has no time for them"
        named = [f"{what} (read for {now - since:.0f} s)" for what, since in under_way[:_NAMED]]
        return ", ".join(named) + (", ..." if len(under_way) > _NAMED else "")
