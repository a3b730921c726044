"""Prompt to picture with FLUX.2 and TACA."""

from taca_jax.families.flux2.family import FLUX2
from taca_jax.families.flux2.model import Flux2Transformer
from taca_jax.pipelines.pipeline import Pipeline


class Flux2Pipeline(Pipeline):
    """A FLUX.2 transformer with text encoder and autoencoder. The text encoder may be absent if
    calls give embeddings, the autoencoder if they ask for latents.

    The text encoder is Qwen3 in `text_encoder/`. Latents are a sixteenth of the picture's size, of
    128 channels. Pictures are drawn from text alone: references to edit are not supported.
    """

    reads = FLUX2

    @property
    def transformer(self) -> Flux2Transformer:
        return super().transformer
