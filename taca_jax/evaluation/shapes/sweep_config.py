"""The configuration of a sweep over settings of TACA on shapes."""

from dataclasses import dataclass

from taca_jax.config.fields import check
from taca_jax.evaluation.shapes.config import check_size
from taca_jax.evaluation.sweeps import AxesConfig


@dataclass(frozen=True)
class SweepConfig(AxesConfig):
    """Many settings of TACA compared on shapes: the same prompts, drawn from the same noise.

    prompts: per category, of compositions that training shows and of held-out ones each; of a
      category with fewer distinct ones all (held out, shape has 40 and texture 50).
    batch_size: pictures sampled at a time.
    out: the folder for the results; an interrupted sweep goes on where it was, and so does one to
      whose axes values were added.

    Raises UserError for values out of range.
    """

    prompts: int = 100
    batch_size: int = 50
    out: str = "runs/sweep"

    def __post_init__(self):
        super().__post_init__()
        check_size("", self.prompts, self.guidances, self.batch_size)
        check(bool(self.out), "out", "empty", "the name of a folder")
