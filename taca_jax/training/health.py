"""Stops a run whose loss is NaN or has exploded, and names the samples of that step."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import numpy as np

from taca_jax.errors import UserError
from taca_jax.parallel.processes import names_of_all

EXPLODED = 100.0
"""A loss this many times the usual one has exploded. An untrained model's loss is about 2, and the
losses of batches of a single sample differ by a factor of ten or twenty."""

_RECENT = 10


@dataclass(frozen=True)
class Step:
    """A step that has been started: its metrics on the device, and the names of this process's
    samples."""

    number: int
    metrics: Mapping[str, jax.Array]
    samples: Sequence[str]


class Health:
    """Compares each step's loss with the usual losses of the run."""

    def __init__(self):
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._usual = float("inf")
        self._checked = 0

    def check(self, step: Step, under_way: Any = None) -> None:
        """Waits for a step's metrics and checks them; repeated calls for one step have no effect.

        `under_way` is what has been dispatched since. Raises UserError, in every process alike, if
        the loss or the gradient is not finite, or the loss is more than EXPLODED times the usual
        one: the lowest median of ten consecutive losses so far.
        """
        if step.number <= self._checked:
            return
        self._checked = step.number
        for name in ("loss", "gradient_norm"):
            value = float(step.metrics[name])
            if not np.isfinite(value):
                raise _refused(step, f"the {name.replace('_', ' ')} is {value}", under_way)
        loss = float(step.metrics["loss"])
        if loss > EXPLODED * self._usual:
            times = loss / self._usual
            raise _refused(step, f"the loss is {loss:.4g}, {times:.0f} times the usual", under_way)
        self._recent.append(loss)
        if len(self._recent) == _RECENT:
            self._usual = min(self._usual, median(self._recent))


def _refused(step: Step, what: str, under_way: Any) -> UserError:
    # Processes must run programs over the mesh in the same order, so wait for the one under way.
    jax.block_until_ready(under_way)
    return UserError(
        f"{what} at step {step.number}, on the samples {', '.join(names_of_all(step.samples))}; "
        "start another run (out_dir=...) with a lower optimizer.learning_rate or a smaller "
        "optimizer.clip_norm, or without these samples"
    )
