"""Being told to stop: by SIGTERM, which clouds and schedulers send before they take a machine, or
by Ctrl-C."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from taca_jax.errors import StoppedError


class Notice:
    """Whether this run has been told to stop; a context manager.

    SIGTERM ends the run at once, with StoppedError, where it has nothing to finish first; between
    `steps` it is noted, and so is the first Ctrl-C, of which the second stops at once. That is of a
    process alone. Of several, JAX's preemption service notes SIGTERM and tells the others, so that
    all of them end after the same step. `go_on` is what to do then, for the message.
    """

    def __init__(self, go_on: str):
        self._go_on = go_on
        self._told = False
        self._in_steps = False
        self._asked = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Notice":
        # Signals are the main thread's; a run in another thread is its starter's to end.
        main = threading.current_thread() is threading.main_thread()
        if main and not jax.distributed.is_initialized():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
            self._before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Where the run asks `reached` after each step, and leaves once it is so."""
        self._in_steps = True
        if self._before:
            signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            self._in_steps = False
            if self._before:
                signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if self._told:  # after the last step was done
            raise self.stopped("all steps are done")

    def reached(self) -> bool:
        """Whether to save and stop after this step, in every process alike; to be asked by all of
        them after each step."""
        self._asked += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._told

    def stopped(self, where: str) -> StoppedError:
        """What to raise once everything is saved; `where` says how far the run is."""
        return StoppedError(f"told to stop: {where}; {self._go_on}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._in_steps:
            raise self.stopped("what is done is saved")
        self._told = True
        if number == signal.SIGINT:
            print("stopping after this step, saved; Ctrl-C again stops at once", file=sys.stderr)
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
