"""Requests to stop: SIGTERM, which clouds and schedulers send before they take a machine away, and
Ctrl-C."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from taca_jax.errors import StoppedError


class Notice:
    """Whether this run has been asked to stop; a run has one Notice.

    A single process records SIGTERM and the first Ctrl-C while it is within `steps`; a second
    Ctrl-C stops it at once, as both signals do outside of `steps`, where there is nothing to save.
    With several processes JAX's preemption service records SIGTERM at any time and tells the other
    processes, so that all of them stop after the same step. `go_on` says how to resume, for the
    message.
    """

    def __init__(self, go_on: str):
        self._go_on = go_on
        self._signalled = False
        self._queries = 0
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def steps(self) -> Iterator[None]:
        """A context in which signals are recorded, and `reached` is called after each step."""
        # Only the main thread can handle signals; a run in another thread is stopped by its caller.
        main = threading.current_thread() is threading.main_thread()
        if main and not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                # A shell's background jobs ignore Ctrl-C, and should go on doing so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()

    def reached(self) -> bool:
        """Whether to save and stop after this step; all processes call this after each step, and
        get the same answer."""
        # The service needs numbers that increase alike in all processes. Step numbers would not:
        # they start again after encoding, and elsewhere when a run is resumed.
        self._queries += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self._queries)
        return self._signalled

    def stopped(self, where: str) -> StoppedError:
        """The exception to raise once everything is saved; `where` says how far the run got."""
        return StoppedError(f"told to stop: {where}; {self._go_on}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            print("stopping after this step, saved; Ctrl-C again stops at once", file=sys.stderr)
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
