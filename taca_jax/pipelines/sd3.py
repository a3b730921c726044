"""Prompt to picture with Stable Diffusion 3 and 3.5, and TACA."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.errors import UserError
from taca_jax.models.sd3 import SD3Transformer
from taca_jax.pipelines.base import Pipeline, PipelineOutput, PipelineSettings
from taca_jax.pipelines.text_folders import Load, load_sd3_text
from taca_jax.sampling import Conditioning, SkipLayers
from taca_jax.taca import TacaConfig
from taca_jax.text import SD3Text
from taca_jax.tokenizers import Tokenizer


class SD3Pipeline(Pipeline):
    """A Stable Diffusion 3 transformer with what it needs around it; parts may be absent where
    embeddings or latents are given instead.

    Its text encoders are CLIP-L in `text_encoder/`, CLIP-bigG in `text_encoder_2/` and, if it is
    there, T5 in `text_encoder_3/`.
    """

    transformer: SD3Transformer
    kind = "sd3"
    text_encoders = "Stable Diffusion 3 has two CLIPs, and T5 if you like"

    @classmethod
    def _load_text(
        cls, folder: Path, load: Load, settings: PipelineSettings, config: Any
    ) -> tuple[SD3Text, Tokenizer] | None:
        return load_sd3_text(
            folder,
            load,
            tokenizer=settings.tokenizer,
            t5_length=settings.text_length,
            txt_dim=config.txt_dim,
        )

    def _encode(
        self, encoder: SD3Text, tokenizer: Tokenizer, prompts: Sequence[str]
    ) -> Conditioning:
        graph, state = nnx.split(encoder)
        return _encode(graph, state, tokenizer(prompts))

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
        skip_layers: SkipLayers | Sequence[int] | None = None,
        output: Literal["pil", "array", "latents"] = "pil",
        trajectory: bool = False,
        callback: Callable[[int, Float[Array, "b h w c"]], None] | None = None,
    ) -> PipelineOutput:
        """Pictures of `prompt` (one or several, each `num_images` times).

        Sizes are in pixels. With `guidance` above 1 the velocity is led away from that of
        `negative_prompt` ("" by default). Picture i starts from the noise of `seed` + i, or from
        `latents`. `taca` None is plain attention; attached LoRA factors act while TACA does, at
        `lora_strength`. `skip_layers` adds skip-layer guidance, away from the model without those
        layers (7, 8, 9 of 3.5-Medium), with guidance only: layers as a sequence, or SkipLayers for
        its strength and time. `callback(step, latents)` runs after each step (and keeps the loop
        from being one program).

        Raises UserError for input that does not fit together.
        """
        if guidance is None:
            guidance = self.settings.guidance
        positive = self._positive(prompt, prompt_embeds, pooled_prompt_embeds, num_images)
        batch = positive.txt.shape[0]
        negative = self._negative(
            negative_prompt,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            guidance,
            batch,
        )
        if skip_layers is not None:
            if negative is None:
                raise UserError(f"skip_layers acts with guidance above 1; it is {guidance:g}")
            if not isinstance(skip_layers, SkipLayers):
                skip_layers = SkipLayers(tuple(skip_layers))
        return self._sample(
            self._noise(latents, batch, height, width, seed),
            positive,
            negative,
            guidance=guidance,
            steps=steps,
            taca=taca,
            lora_strength=lora_strength,
            skip=skip_layers,
            output=output,
            trajectory=trajectory,
            callback=callback,
        )


@jax.jit(static_argnames=("graph",))
def _encode(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> Conditioning:
    return nnx.merge(graph, state)(tokens)
