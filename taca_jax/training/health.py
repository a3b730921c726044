"""Steps whose loss is no number, or has run away, and the samples that they were made on."""

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
"""A loss so many times the usual one has run away. The loss of a model that predicts nothing is
about 2, and single batches of one sample differ by a factor of ten or twenty."""

_RECENT = 10


@dataclass(frozen=True)
class Step:
    """A step that has been started: its metrics, still on the device, and the names of this
    process's samples in it."""

    number: int
    metrics: Mapping[str, jax.Array]
    samples: Sequence[str]


class Health:
    """What losses are usual in a run, and whether a step's is among them."""

    def __init__(self):
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._usual = float("inf")
        self._checked = 0

    def check(self, step: Step, under_way: Any = None) -> None:
        """Waits for the step; each counts once. `under_way` is what has been started since.

        Raises UserError, in every process alike, where the loss or the gradient is no number, or
        the loss more than EXPLODED times the usual: the lowest median of ten in a row so far.
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
    # One thing at a time over the mesh: elsewhere it may come in another order.
    jax.block_until_ready(under_way)
    return UserError(
        f"{what} at step {step.number}, on the samples {', '.join(names_of_all(step.samples))}; "
        "start another run (out_dir=...) with a lower optimizer.learning_rate or a smaller "
        "optimizer.clip_norm, or without these samples"
    )
