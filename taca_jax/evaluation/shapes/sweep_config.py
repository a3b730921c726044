"""The configuration of a sweep over settings of TACA."""

from dataclasses import dataclass
from typing import Literal

from taca_jax.config.fields import check, show
from taca_jax.errors import UserError
from taca_jax.evaluation.shapes.config import check_size
from taca_jax.pipelines.config import SamplingConfig
from taca_jax.taca import Schedule


@dataclass(frozen=True)
class SweepConfig(SamplingConfig):
    """Many settings of TACA compared on shapes: the same prompts, drawn from the same noise.

    The center is the settings of `taca`, `lora` and `guidance`; an axis that is empty stays there.

    gammas: values of taca.gamma, each instead of the center's knots if it has any.
    thresholds: values of taca.threshold.
    schedules: values of taca.schedule, each instead of the center's knots if it has any.
    cond_only: values of taca.cond_only; at guidance of at most 1 all of them are the same.
    loras: LoRA files, one for each setting (as `lora`, which may name several at once); `none` is
      the base alone.
    gammas_learned: files `taca.json` of runs with gamma_knots; each is one more setting.
    guidances: strengths of guidance; each setting is compared with the plain base at its own.
    vary: `each` changes one axis at a time, `all` combines all values of all axes.
    prompts: per category, of compositions that training shows and of held-out ones each; of a
      category with fewer distinct ones all (held out, shape has 40 and texture 50).
    batch_size: pictures sampled at a time.
    out: the folder for the results; an interrupted sweep goes on where it was, and so does one to
      whose axes values were added.

    Raises UserError for values out of range, and for thresholds or schedules around a center with
    first_steps, which has no use for them.
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
    out: str = "runs/sweep"

    def __post_init__(self):
        super().__post_init__()
        if self.taca is None:
            raise UserError("taca is none; it must be the center of the sweep; set taca.gamma")
        for name in ("thresholds", "schedules"):
            if self.taca.first_steps is not None and (values := getattr(self, name)):
                raise UserError(
                    f"{name}={show(values)} does nothing with taca.first_steps="
                    f"{self.taca.first_steps}; leave one of the two out"
                )
        check_size("", self.prompts, self.guidances, self.batch_size)
        check(bool(self.out), "out", "empty", "the name of a folder")
