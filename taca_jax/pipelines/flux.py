"""Prompt to picture with FLUX and TACA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from PIL import Image

from taca_jax.checkpoint import load_model, save_model
from taca_jax.errors import UserError
from taca_jax.fields import from_json, to_json
from taca_jax.formats.lora_files import read_lora
from taca_jax.lora import remove_lora
from taca_jax.models.flux import FluxTransformer
from taca_jax.models.pixels import Pixels
from taca_jax.models.stack import Remat
from taca_jax.models.t5 import T5Encoder
from taca_jax.models.tiny_vae import TinyVAE
from taca_jax.models.vae import AutoencoderKL
from taca_jax.pipelines.text_folders import encoder_parts, load_flux_text, save_tokenizers
from taca_jax.sampling import Conditioning, FlowSchedule, Trajectory, denoise, make_plan
from taca_jax.sharding import placement
from taca_jax.taca import TacaConfig
from taca_jax.text import FluxText, encode
from taca_jax.tokenizers import Tokenizer, announce_cuts
from taca_jax.weights import find_weights

Autoencoder = Pixels | TinyVAE | AutoencoderKL

SETTINGS_FILE = "pipeline.json"


@dataclass(frozen=True)
class PipelineSettings:
    """What a pipeline folder says beside its weights.

    tokenizer: T5's, as in TextConfig, or None where the pipeline's folder has it, as `tokenizer/`
      beside `text_encoder/`, or `tokenizer_2/` beside `text_encoder_2/`.
    text_length: tokens that T5 reads.
    resolution: pixels per side that the model was trained at.
    steps, guidance: what a call takes that names none.
    schedule: the sampler's noise levels.
    """

    tokenizer: str | None
    text_length: int
    resolution: int
    steps: int
    guidance: float
    schedule: FlowSchedule


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline call returns.

    images: PIL pictures, or float32 `[b, H, W, 3]` in [0, 1], or None for output="latents".
    latents: the last ones, float32 NHWC. trajectory: each step's latents and predicted x0, where
    asked for.
    """

    images: list[Image.Image] | np.ndarray | None
    latents: Float[Array, "b h w c"]
    trajectory: Trajectory | None


class FluxPipeline:
    """A FLUX transformer with what it needs around it; parts may be absent where embeddings or
    latents are given instead."""

    def __init__(
        self,
        transformer: FluxTransformer,
        *,
        text_encoder: T5Encoder | FluxText | None,
        tokenizer: Tokenizer | None,
        autoencoder: Autoencoder | None,
        settings: PipelineSettings,
        mesh: Mesh | None = None,
    ):
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.autoencoder = autoencoder
        self.settings = settings
        self.mesh = mesh

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        *,
        param_dtype: Literal["float32", "bfloat16"] | None = None,
        mesh: Mesh | None = None,
        remat: Remat = "none",
    ) -> "FluxPipeline":
        """The pipeline in a folder: `pipeline.json`, `transformer/`, and where present
        `text_encoder/` (CLIP, or in small models T5), `text_encoder_2/` (T5) and `autoencoder/`.

        `path` may also be the name of a model that comes with the package (`shapes_base`).

        `dtype` is of activations, and of parameters unless `param_dtype` says otherwise. Parameters
        go straight to their places on `mesh` (`sharding.make_mesh`), over which the pipeline then
        runs; without one, to the first device. `remat` matters to training only.

        Raises UserError where the folder or a part of it is missing or damaged.
        """
        path = find_weights(path)
        settings_file = path / SETTINGS_FILE
        if not settings_file.is_file():
            raise UserError(f"{path} is no pipeline folder: it has no {SETTINGS_FILE}")
        settings = from_json(PipelineSettings, settings_file.read_text(), str(settings_file))
        load = partial(
            load_model,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype or dtype),
            place=placement(mesh),
        )
        transformer = load(path / "transformer", remat=remat)
        text_encoder = tokenizer = autoencoder = None
        text = load_flux_text(
            path,
            load,
            tokenizer=settings.tokenizer,
            t5_length=settings.text_length,
            txt_dim=transformer.config.txt_dim,
            pooled_dim=transformer.config.pooled_dim,
        )
        if text is not None:
            text_encoder, tokenizer = text
        if (path / "autoencoder").is_dir():
            autoencoder = load(path / "autoencoder")
        return cls(
            transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            autoencoder=autoencoder,
            settings=settings,
            mesh=mesh,
        )

    def save(
        self,
        path: str | Path,
        *,
        format: Literal["orbax", "safetensors"] = "safetensors",
        dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> None:
        """Writes the folder that `from_pretrained` reads; LoRA factors are left out."""
        path = Path(path)
        parts = {
            "transformer": self.transformer,
            **encoder_parts(self.text_encoder),
            "autoencoder": self.autoencoder,
        }
        path.mkdir(parents=True, exist_ok=True)
        for name, model in parts.items():
            if model is not None:
                save_model(path / name, model, format=format, dtype=dtype)
        settings = self.settings
        if save_tokenizers(path, self.tokenizer):
            settings = replace(settings, tokenizer=None)
        (path / SETTINGS_FILE).write_text(to_json(settings) + "\n")

    def load_lora(self, path: str | Path) -> str:
        """Attaches a LoRA file in place of any other; returns a line that says what it holds.

        Raises UserError for a file that is damaged or made for another model.
        """
        before = nnx.split(self.transformer)
        self.unload_lora()
        try:
            return str(read_lora(find_weights(path), self.transformer))
        except UserError:
            self.transformer = nnx.merge(*before)  # with the factors that it had
            raise

    def unload_lora(self) -> None:
        """Takes LoRA factors off; without any this does nothing."""
        remove_lora(self.transformer)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of prompts; a warning says what of one is too long to be read.

        Raises UserError where the pipeline lacks a text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(
                "this pipeline lacks a text encoder (FLUX.1 has CLIP and T5); give prompt_embeds "
                "and pooled_prompt_embeds, or add it"
            )
        announce_cuts(self.tokenizer, prompts)
        graph, state = nnx.split(self.text_encoder)
        return _encode(graph, state, self.tokenizer(prompts), self.tokenizer.pad_id)

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
        config = self.transformer.config
        settings = self.settings
        if guidance is None:
            guidance = settings.guidance
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be 1 or more")
        positive = self._conditioning(prompt, prompt_embeds, pooled_prompt_embeds, "prompt")
        positive = jax.tree.map(lambda x: jnp.repeat(x, num_images, axis=0), positive)
        batch = positive.txt.shape[0]

        negative = None
        if config.guidance_embed:
            if negative_prompt is not None or negative_prompt_embeds is not None:
                raise UserError("this model embeds its guidance and takes no negative prompt")
            positive = replace(positive, guidance=jnp.full(batch, guidance, jnp.float32))
        elif guidance > 1:
            text = negative_prompt
            if text is None and negative_prompt_embeds is None:
                text = ""
            negative = self._conditioning(
                text, negative_prompt_embeds, negative_pooled_prompt_embeds, "negative_prompt"
            )
            given = negative.txt.shape[0]
            if batch % given:
                raise UserError(f"{given} negative prompts for {batch} pictures; give one")
            negative = jax.tree.map(lambda x: jnp.repeat(x, batch // given, axis=0), negative)
        elif negative_prompt is not None or negative_prompt_embeds is not None:
            raise UserError(f"a negative prompt acts with guidance above 1; it is {guidance:g}")

        latents = self._noise(latents, batch, height, width, seed)
        tokens = latents.shape[1] * latents.shape[2] // config.patch_size**2
        sigmas = settings.schedule.sigmas(settings.steps if steps is None else steps, tokens)
        plan = make_plan(sigmas, taca, lora_strength=lora_strength)

        scale = jnp.float32(guidance)
        seen = None
        if callback is None:
            latents, seen = denoise(
                self.transformer, latents, plan, positive, negative, scale, trajectory=trajectory
            )
        else:
            steps_seen = []
            for i in range(len(plan.sigma)):
                now = jax.tree.map(lambda x, i=i: x[i : i + 1], plan)
                latents, one = denoise(
                    self.transformer, latents, now, positive, negative, scale, trajectory=trajectory
                )
                steps_seen.append(one)
                callback(i, latents)
            if trajectory:
                seen = jax.tree.map(lambda *x: jnp.concatenate(x), *steps_seen)
        return PipelineOutput(self._pictures(latents, output), latents, seen)

    def _conditioning(
        self,
        prompt: str | Sequence[str] | None,
        embeds: Float[Array, "b t k"] | None,
        pooled: Float[Array, "b p"] | None,
        name: str,
    ) -> Conditioning:
        if (embeds is None) != (pooled is None) or (embeds is None) == (prompt is None):
            pooled_name = name.replace("prompt", "pooled_prompt_embeds")
            raise UserError(f"give either {name}, or {name}_embeds with {pooled_name}")
        if embeds is not None and pooled is not None:
            return Conditioning(jnp.asarray(embeds), jnp.asarray(pooled))
        assert prompt is not None
        return self.encode_prompts([prompt] if isinstance(prompt, str) else list(prompt))

    def _noise(
        self,
        latents: Float[Array, "b h w c"] | None,
        batch: int,
        height: int | None,
        width: int | None,
        seed: int,
    ) -> Float[Array, "b h w c"]:
        config = self.transformer.config
        downscale = 8 if self.autoencoder is None else self.autoencoder.config.downscale
        if latents is not None:
            patch, channels = config.patch_size, config.latent_channels
            if (
                latents.ndim != 4
                or (latents.shape[0], latents.shape[3]) != (batch, channels)
                or latents.shape[1] % patch
                or latents.shape[2] % patch
            ):
                raise UserError(
                    f"latents are {latents.shape}; expected {batch} of {channels} channels, "
                    f"height and width multiples of {patch}"
                )
            return jnp.asarray(latents, jnp.float32)
        height = self.settings.resolution if height is None else height
        width = self.settings.resolution if width is None else width
        multiple = downscale * config.patch_size
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise UserError(f"{height} x {width} pixels: both must be multiples of {multiple}")
        shape = (height // downscale, width // downscale, config.latent_channels)
        seeds = jnp.arange(seed, seed + batch)
        return jax.vmap(lambda s: jax.random.normal(jax.random.key(s), shape))(seeds)

    def _pictures(
        self, latents: Float[Array, "b h w c"], output: Literal["pil", "array", "latents"]
    ) -> list[Image.Image] | np.ndarray | None:
        if output == "latents":
            return None
        if self.autoencoder is None:
            raise UserError('this pipeline has no autoencoder; ask for output="latents"')
        graph, state = nnx.split(self.autoencoder)
        images = np.asarray(_decode(graph, state, latents))
        if output == "array":
            return images
        return [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in images]


@jax.jit(static_argnames=("graph", "pad_id"))
def _encode(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, pad_id: int) -> Conditioning:
    return encode(nnx.merge(graph, state), tokens, pad_id)


@jax.jit(static_argnames=("graph",))
def _decode(
    graph: nnx.GraphDef, state: nnx.State, latents: Float[Array, "b h w c"]
) -> Float[Array, "b H W 3"]:
    images = nnx.merge(graph, state).decode(latents).astype(jnp.float32)
    return jnp.clip((images + 1) / 2, 0, 1)
