"""Being told to stop: by SIGTERM, which clouds and schedulers send before they take a machine."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Notice:
    """Whether this run has been told to stop; a context manager.

    Alone, a process notes SIGTERM itself. Of several, JAX's preemption service notes it and tells
    the others, so that all of them end after the same step.
    """

    def __init__(self):
        self._told = False
        self._before: Any = None
        self._ours = False

    def __enter__(self) -> "Notice":
        # Signals are the main thread's; a run in another thread is its starter's to end.
        main = threading.current_thread() is threading.main_thread()
        if main and not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._ours = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)
            self._ours = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step, in every process alike; to be asked after each
        step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told
