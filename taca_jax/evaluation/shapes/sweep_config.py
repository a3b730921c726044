"""The configuration of a sweep over settings of TACA."""

import math
from dataclasses import dataclass
from typing import Literal

from taca_jax.config.fields import check
from taca_jax.pipelines.config import SamplingConfig
from taca_jax.taca import Schedule


@dataclass(frozen=True)
class SweepConfig(SamplingConfig):
    """Many settings of TACA compared on shapes: the same prompts, drawn from the same noise.

    The center is the settings of `taca`, `lora` and `guidance`; an axis that is empty stays there.

    gammas: values of taca.gamma.
    thresholds: values of taca.threshold.
    schedules: values of taca.schedule.
    cond_only: values of taca.cond_only, for guidance above 1.
    loras: LoRA files; `none` is the base alone.
    gammas_learned: files `taca.json` of runs with gamma_knots; each is one more setting.
    guidances: strengths of guidance; each setting is compared with the plain base at its own.
    vary: `each` changes one axis at a time, `all` combines all values of all axes.
    prompts: per category, of compositions that training shows and of held-out ones each; of a
      category with fewer distinct ones all (held out, shape has 40 and texture 50).
    batch_size: pictures sampled at a time.
    out: the folder for the results; an interrupted sweep goes on where it was, and so does one to
      whose axes values were added.

    Raises UserError for values out of range.
    """

    gammas: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    cond_only: tuple[bool, ...] = ()
    loras: tuple[str, ...] = ()
    gammas_learned: tuple[str, ...] = ()
    guidances: tuple[float, ...] = ()
    vary: Literal["each", "all"] = "each"
    prompts: int = 100
    batch_size: int = 50
    out: str = "sweep"

    def __post_init__(self):
        super().__post_init__()
        check(self.taca is not None, "taca", "none", "the center of the sweep; set taca.gamma")
        for guidance in self.guidances:
            check(0 <= guidance < math.inf, "guidances", guidance, "0 or more each")
        check(self.prompts >= 1, "prompts", self.prompts, "1 or more per category")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        check(bool(self.out), "out", "empty", "the name of a folder")
