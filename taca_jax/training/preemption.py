"""Being told to stop: by SIGTERM, which clouds and schedulers send before they take a machine, or
by Ctrl-C."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Notice:
    """Whether this run has been told to stop; a context manager.

    Alone, a process notes SIGTERM itself, and the first Ctrl-C; the second stops it at once. Of
    several, JAX's preemption service notes SIGTERM and tells the others, so that all of them end
    after the same step.
    """

    def __init__(self):
        self._told = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Notice":
        # Signals are the main thread's; a run in another thread is its starter's to end.
        main = threading.current_thread() is threading.main_thread()
        if main and not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        if number == signal.SIGINT:
            print("stopping after this step, saved; Ctrl-C again stops at once", file=sys.stderr)
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step, in every process alike; to be asked after each
        step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told
