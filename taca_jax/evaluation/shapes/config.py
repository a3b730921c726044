"""The configurations of the evaluations on shapes."""

from dataclasses import dataclass

from taca_jax.config.fields import check
from taca_jax.errors import UserError
from taca_jax.evaluation.sweeps import check_guidances
from taca_jax.pipelines.config import SamplingConfig


def check_size(prefix: str, prompts: int, guidances: tuple[float, ...], batch_size: int) -> None:
    """Raises UserError for values of these fields, in the group `prefix`, that are out of range."""
    check(prompts >= 1, f"{prefix}prompts", prompts, "1 or more per category")
    check_guidances(f"{prefix}guidances", guidances)
    check(batch_size >= 1, f"{prefix}batch_size", batch_size, "1 or more")


@dataclass(frozen=True)
class EvalConfig:
    """The evaluation at the end of a training run on shapes.

    prompts: per category, of compositions that training shows and of held-out ones each; of a
      category with fewer distinct ones all (held out, shape has 40 and texture 50).
    steps: sampling steps per picture; none is the model's own number.
    guidances: strengths of guidance to compare; empty is the model's own alone. A model trained
      from scratch then keeps the one that is best on seen compositions as its own.
    batch_size: pictures sampled at a time.

    Raises UserError for values out of range.
    """

    prompts: int = 50
    steps: int | None = None
    guidances: tuple[float, ...] = ()
    batch_size: int = 50

    def __post_init__(self):
        check_size("evaluate.", self.prompts, self.guidances, self.batch_size)
        check(self.steps is None or self.steps >= 1, "evaluate.steps", self.steps, "1 or more")


@dataclass(frozen=True)
class ShapesConfig(SamplingConfig):
    """How often a model draws shapes as prompts say.

    With a LoRA the base, the base with TACA, both and the LoRA alone are compared; without one the
    first two, and with taca=none the base is measured alone.

    guidances: strengths of guidance to compare, instead of one `guidance`.
    prompts: per category, of compositions that training shows and of held-out ones each; of a
      category with fewer distinct ones all (held out, shape has 40 and texture 50).
    num_images: pictures of each prompt; with several, the prompts that are drawn right most often
      are listed.
    batch_size: pictures sampled at a time.
    out: the folder for the results; an interrupted evaluation goes on where it was.

    Raises UserError for values out of range.
    """

    guidances: tuple[float, ...] = ()
    prompts: int = 50
    num_images: int = 1
    batch_size: int = 50
    out: str = "runs/shapes_evaluation"

    def __post_init__(self):
        super().__post_init__()
        check_size("", self.prompts, self.guidances, self.batch_size)
        check(self.num_images >= 1, "num_images", self.num_images, "1 or more")
        check(bool(self.out), "out", "empty", "the name of a folder")
        if self.guidance is not None and self.guidances:
            raise UserError(
                f"guidance is {self.guidance:g} and guidances are given too; give one of the two"
            )
