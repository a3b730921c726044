"""Prompt to picture with FLUX and TACA."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.errors import UserError
from taca_jax.models.flux import FluxTransformer
from taca_jax.models.t5 import T5Encoder
from taca_jax.pipelines.base import Autoencoder, Pipeline, PipelineOutput, PipelineSettings
from taca_jax.pipelines.text_folders import Load, load_flux_text
from taca_jax.sampling import Conditioning
from taca_jax.taca import TacaConfig
from taca_jax.text import FluxText, encode
from taca_jax.tokenizers import Tokenizer

__all__ = ["Autoencoder", "FluxPipeline", "PipelineOutput", "PipelineSettings"]


class FluxPipeline(Pipeline):
    """A FLUX transformer with what it needs around it; parts may be absent where embeddings or
    latents are given instead.

    Its text encoders are CLIP in `text_encoder/` and T5 in `text_encoder_2/`, or in small models a
    T5 alone.
    """

    transformer: FluxTransformer
    kind = "flux"
    text_encoders = "FLUX.1 has CLIP and T5"

    @classmethod
    def _load_text(
        cls, folder: Path, load: Load, settings: PipelineSettings, config: Any
    ) -> tuple[T5Encoder | FluxText, Tokenizer] | None:
        return load_flux_text(
            folder,
            load,
            tokenizer=settings.tokenizer,
            t5_length=settings.text_length,
            txt_dim=config.txt_dim,
            pooled_dim=config.pooled_dim,
        )

    def _encode(
        self, encoder: T5Encoder | FluxText, tokenizer: Tokenizer, prompts: Sequence[str]
    ) -> Conditioning:
        graph, state = nnx.split(encoder)
        return _encode(graph, state, tokenizer(prompts), tokenizer.pad_id)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        num_images: int = 1,
        taca: TacaConfig | None = None,
        lora_strength: float = 1.0,
        prompt_embeds: Float[Array, "b t k"] | None = None,
        pooled_prompt_embeds: Float[Array, "b p"] | None = None,
        negative_prompt_embeds: Float[Array, "b t k"] | None = None,
        negative_pooled_prompt_embeds: Float[Array, "b p"] | None = None,
        latents: Float[Array, "b h w c"] | None = None,
        output: Literal["pil", "array", "latents"] = "pil",
        trajectory: bool = False,
        callback: Callable[[int, Float[Array, "b h w c"]], None] | None = None,
    ) -> PipelineOutput:
        """Pictures of `prompt` (one or several, each `num_images` times).

        Sizes are in pixels. `guidance` is embedded where the model takes it; other models use it
        for classifier-free guidance against `negative_prompt` ("" by default) when it is above 1.
        A model with embedded guidance refuses `negative_prompt`. Picture i starts from the noise of
        `seed` + i, or from `latents`. `taca` None is plain attention; attached LoRA factors act
        while TACA does, at `lora_strength`. `callback(step, latents)` runs after each step (and
        keeps the loop from being one program).

        Raises UserError for input that does not fit together.
        """
        if guidance is None:
            guidance = self.settings.guidance
        positive = self._positive(prompt, prompt_embeds, pooled_prompt_embeds, num_images)
        batch = positive.txt.shape[0]
        negative = None
        if self.transformer.config.guidance_embed:
            if negative_prompt is not None or negative_prompt_embeds is not None:
                raise UserError("this model embeds its guidance and takes no negative prompt")
            positive = replace(positive, guidance=jnp.full(batch, guidance, jnp.float32))
        else:
            negative = self._negative(
                negative_prompt,
                negative_prompt_embeds,
                negative_pooled_prompt_embeds,
                guidance,
                batch,
            )
        return self._sample(
            self._noise(latents, batch, height, width, seed),
            positive,
            negative,
            guidance=guidance,
            steps=steps,
            taca=taca,
            lora_strength=lora_strength,
            output=output,
            trajectory=trajectory,
            callback=callback,
        )


@jax.jit(static_argnames=("graph", "pad_id"))
def _encode(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, pad_id: int) -> Conditioning:
    return encode(nnx.merge(graph, state), tokens, pad_id)
