"""The configuration of the evaluation of a run on shapes."""

from dataclasses import dataclass

from taca_jax.config.fields import check


@dataclass(frozen=True)
class EvalConfig:
    """The evaluation at the end of a training run on shapes.

    prompts: held-out prompts per category, with a picture of each; if a category has fewer distinct
      ones (shape has 40, texture 50), they repeat with other noise.
    steps: sampling steps per picture.
    guidance: strength of classifier-free guidance; 1 is none.
    batch_size: pictures sampled at a time.

    Raises UserError for values out of range.
    """

    prompts: int = 100
    steps: int = 20
    guidance: float = 1.0
    batch_size: int = 50

    def __post_init__(self):
        check(self.prompts >= 1, "evaluate.prompts", self.prompts, "1 or more per category")
        check(self.steps >= 1, "evaluate.steps", self.steps, "1 or more")
        check(self.guidance >= 0, "evaluate.guidance", self.guidance, "0 or more")
        check(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "1 or more")
