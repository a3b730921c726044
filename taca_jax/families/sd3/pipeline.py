"""Prompt to picture with Stable Diffusion 3 and 3.5, and TACA."""

from taca_jax.families.sd3.family import SD3
from taca_jax.families.sd3.model import SD3Transformer
from taca_jax.pipelines.pipeline import Pipeline


class SD3Pipeline(Pipeline):
    """A Stable Diffusion 3 transformer with text encoders and autoencoder. Text encoders may be
    absent if calls give embeddings, the autoencoder if they ask for latents.

    The text encoders are CLIP-L in `text_encoder/`, CLIP-bigG in `text_encoder_2/` and optionally
    T5 in `text_encoder_3/`.
    """

    reads = SD3

    @property
    def transformer(self) -> SD3Transformer:
        return super().transformer
