"""The configuration of the analysis of attention."""

from dataclasses import dataclass

from taca_jax.config.fields import check
from taca_jax.errors import UserError
from taca_jax.pipelines.config import SamplingConfig


@dataclass(frozen=True)
class AttentionConfig(SamplingConfig):
    """What is drawn, and what of its attention is shown.

    prompt: what to draw; several prompts are separated by |.
    negative_prompt: what to avoid, with classifier-free guidance.
    num_images: pictures of each prompt; their seeds are seed, seed + 1, ... .
    gammas: the temperatures to compare; plain attention (1) is always among them.
    word: a word of the first prompt, or several successive ones, whose share of attention is drawn
      over its pictures; none draws that of every word.
    layer: the layer that maps show, counted from 0; none is the mean of all.
    batch_size: pictures drawn at a time.
    stages: text encoders, transformer and autoencoder take turns in memory; none does so only where
      not all of them fit.
    out: the folder of figures and numbers; an analysis that was interrupted there is completed.

    Raises UserError for values out of range.
    """

    prompt: str = "a green circle above a blue square"
    negative_prompt: str | None = None
    num_images: int = 8
    gammas: tuple[float, ...] = (1.0, 1.1, 1.2, 1.3)
    word: str | None = None
    layer: int | None = None
    batch_size: int = 8
    stages: bool | None = None
    out: str = "runs/attention"

    def __post_init__(self):
        super().__post_init__()
        check(bool(self.prompts), "prompt", "empty", "what to draw")
        check(self.num_images >= 1, "num_images", self.num_images, "1 or more")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        for gamma in self.gammas:
            check(gamma > 0, "gammas", gamma, "numbers above 0")
        check(self.layer is None or self.layer >= 0, "layer", self.layer, "0 or more, or none")
        check(bool(self.out), "out", "empty", "the name of a folder")
        if self.taca is None:
            raise UserError("attention compares plain with TACA; leave taca on (not taca=none)")

    @property
    def prompts(self) -> list[str]:
        return [prompt for each in self.prompt.split("|") if (prompt := each.strip())]
