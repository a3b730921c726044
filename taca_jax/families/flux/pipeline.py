"""Prompt to picture with FLUX and TACA."""

from typing import Any

from taca_jax.families.flux.model import FluxTransformer
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.text import Load, load_flux_text
from taca_jax.text.encoders import FluxText
from taca_jax.text.t5 import T5Encoder
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.weights.pipeline_folders import Parts


class FluxPipeline(Pipeline):
    """A FLUX transformer with what it needs around it; parts may be absent where embeddings or
    latents are given instead.

    Its text encoders are CLIP in `text_encoder/` and T5 in `text_encoder_2/`, or in small models a
    T5 alone.
    """

    transformer: FluxTransformer
    kind = "flux"
    text_encoders = "FLUX.1 has CLIP and T5"
    has_skip_layers = False

    @classmethod
    def _load_text(
        cls, parts: Parts, load: Load, config: Any
    ) -> tuple[T5Encoder | FluxText, Tokenizer] | None:
        return load_flux_text(parts, load, txt_dim=config.txt_dim, pooled_dim=config.pooled_dim)

    def _embeds_guidance(self) -> bool:
        return self.transformer.config.guidance_embed
