"""Being told to stop: by SIGTERM, which clouds and schedulers send before they take a machine, or
by Ctrl-C."""

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
    """Whether this run has been told to stop; one for the whole of it.

    Alone, a process notes SIGTERM between `steps`, and the first Ctrl-C; the second stops it at
    once, as either does elsewhere, where there is nothing to finish first. Of several, JAX's
    preemption service notes SIGTERM at any time and tells the others, so that all of them end after
    the same step. `go_on` is what to do then, for the message.
    """

    def __init__(self, go_on: str):
        self._go_on = go_on
        self._told = False
        self._asked = 0
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Where the run asks `reached` after each step, and stops once it is so."""
        # Signals are the main thread's; a run in another thread is its starter's to end.
        main = threading.current_thread() is threading.main_thread()
        if main and not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                # A shell's background jobs ignore Ctrl-C, which is not meant for them.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()

    def reached(self) -> bool:
        """Whether to save and stop after this step, in every process alike; all of them ask after
        each step."""
        # The service goes by numbers that rise alike in all processes: of steps they would not,
        # which begin anew after encoding, and elsewhere when a run is resumed.
        self._asked += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._told

    def stopped(self, where: str) -> StoppedError:
        """What to raise once everything is saved; `where` says how far the run is."""
        return StoppedError(f"told to stop: {where}; {self._go_on}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        if number == signal.SIGINT:
            print("stopping after this step, saved; Ctrl-C again stops at once", file=sys.stderr)
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
