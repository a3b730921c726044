"""Prompt to picture with FLUX.1 and TACA."""

from taca_jax.families.flux.family import FLUX
from taca_jax.families.flux.model import FluxTransformer
from taca_jax.pipelines.pipeline import Pipeline


class FluxPipeline(Pipeline):
    """A FLUX.1 transformer with text encoders and autoencoder. Text encoders may be absent if calls
    give embeddings, the autoencoder if they ask for latents.

    The text encoders are CLIP in `text_encoder/` and T5 in `text_encoder_2/`, or in small models T5
    alone.
    """

    reads = FLUX

    @property
    def transformer(self) -> FluxTransformer:
        return super().transformer
