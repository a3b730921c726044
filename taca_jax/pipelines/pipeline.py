"""From prompts to pictures: a transformer with its text encoders, tokenizers and autoencoder."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from PIL import Image

from taca_jax.attention import Implementation
from taca_jax.autoencoders.kinds import Autoencoder
from taca_jax.autoencoders.tiling import TILING, Tiling
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import family_of
from taca_jax.formats.atomic import whole_folder
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.lora import remove_lora
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.mesh import on
from taca_jax.parallel.processes import is_first
from taca_jax.pipelines.decoding import decode, to_pil
from taca_jax.pipelines.inputs import (
    NO_DOWNSCALE,
    Prompt,
    check_guidance,
    given_latents,
    negative_conditioning,
    noise,
    picture_size,
    repeated,
    skip_guidance,
)
from taca_jax.pipelines.previews import (
    Callback,
    Preview,
    Previewer,
    drawer,
    read_previewer,
    watcher,
)
from taca_jax.pipelines.progress import step_bar
from taca_jax.pipelines.text import encoders_by_folder, load_text, save_tokenizers
from taca_jax.sampling.loop import SkipLayers, Trajectory, denoise, make_plan
from taca_jax.taca import MAX_TIMESTEP, TacaConfig
from taca_jax.text.encoders import TextEncoder
from taca_jax.text.tokenizers import Tokenizer, announce_cuts
from taca_jax.weights.folders import PIPELINE_FILE, save_model
from taca_jax.weights.hub_files import lora_files
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.lora_files import read_lora
from taca_jax.weights.pipeline_folders import (
    AUTOENCODER,
    TRANSFORMER,
    PipelineSettings,
    open_pipeline,
    write_settings,
)
from taca_jax.weights.shipped import find_weights

Output = Literal["pil", "array", "latents"]

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline call returns.

    images: PIL pictures, or float32 `[b, H, W, 3]` in [0, 1], or None for output="latents".
    latents: the final ones, float32 NHWC. trajectory: each step's latents and predicted x0, if
    requested.
    """

    images: list[Image.Image] | np.ndarray | None
    latents: Float[Array, "b h w c"]
    trajectory: Trajectory | None


class Pipeline:
    """A transformer of any family with its text encoder, tokenizer and autoencoder.

    The text encoder may be absent when calls give embeddings, the autoencoder when they ask for
    latents.
    """

    reads: ClassVar[Family | None] = None
    """The family that `from_pretrained` accepts; None accepts all."""

    def __init__(
        self,
        transformer: Any,
        *,
        text_encoder: TextEncoder | None,
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
        self.previewer: Previewer | None = None

    @property
    def family(self) -> Family:
        return family_of(self.transformer.config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Precision = "bfloat16",
        *,
        param_dtype: Precision | None = None,
        mesh: Mesh | None = None,
        remat: Remat = "none",
        quantize: Quantization = "none",
        quantize_text: Quantization = "none",
        attention: Implementation = "auto",
        tokenizers: str | Path | None = None,
    ) -> Self:
        """Loads a pipeline folder: `pipeline.json`, `transformer/`, and where present the text
        encoders (`text_encoder/`, `text_encoder_2/`, ...) and `autoencoder/`.

        `path` may also be the name of a model that comes with the package (`shapes_base`),
        original weights that have not been converted (a diffusers pipeline folder, or single files
        in one folder: `open_original`), or the hub id of any of these (`hub.ids.FORMS`).
        `tokenizers` is the folder or hub id of the tokenizers where `path` has none.

        `dtype` is that of activations, and of parameters unless `param_dtype` is given. Parameters
        are loaded tensor by tensor and sharded over `mesh` (`parallel.mesh.make_mesh`), on which
        the pipeline then runs; without a mesh they go to the first device. `remat` matters only to
        training. `quantize` is the format of the kernels in the transformer's blocks: `int8`, `nf4`
        or `none` (param_dtype); `quantize_text` is that of T5's kernels. Kernels are quantised as
        they are read. `attention` is the implementation of the joint attention.

        Raises UserError if the pipeline or a part of it is missing, damaged, or of another kind of
        model.
        """
        stored = open_pipeline(path, tokenizers)
        config, family = stored.transformer.config, stored.family
        if cls.reads not in (None, family):
            raise UserError(
                f"{stored.where} is of kind {family.name}; {cls.__name__} reads {cls.reads.name}"
            )
        options = LoadOptions(
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype or dtype),
            mesh=mesh,
        )
        autoencoder = stored.models.get(AUTOENCODER)
        if autoencoder is not None:
            given, expected = autoencoder.config.latent_channels, config.latent_channels
            if given != expected:
                raise UserError(
                    f"{autoencoder.where} has {given} latent channels, the transformer expects "
                    f"{expected}; it is of another model"
                )
        text_encoder, tokenizer = None, None
        if (reading := stored.reading) is not None:
            text_options = replace(options, quantize=quantize_text)
            text_encoder, tokenizer = load_text(stored, reading, text_options)
        return cls(
            stored.transformer.load(
                replace(options, quantize=quantize, remat=remat, attention=attention)
            ),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            autoencoder=None if autoencoder is None else autoencoder.load(options),
            settings=stored.settings,
            mesh=mesh,
        )

    def save(self, path: str | Path, *, dtype: Precision | None = None) -> None:
        """Writes the folder that `from_pretrained` reads, atomically, without LoRA factors; an
        existing pipeline folder is replaced.

        If there are several processes, all must call this. Raises UserError if `path` holds
        something else or cannot be written, and for quantised models.
        """
        path = Path(path)
        is_ours = (path / PIPELINE_FILE).is_file()
        if path.exists() and not is_ours and (path.is_file() or any(path.iterdir())):
            raise UserError(f"{path} exists and is no pipeline folder; save elsewhere")
        models = {
            TRANSFORMER: self.transformer,
            **encoders_by_folder(self.text_encoder),
            AUTOENCODER: self.autoencoder,
        }
        with whole_folder(path) if is_first() else nullcontext(path) as folder:
            for name, model in models.items():
                if model is not None:
                    save_model(folder / name, model, dtype=dtype)
            if is_first():
                settings = self.settings
                if save_tokenizers(folder, self.tokenizer):
                    settings = replace(settings, tokenizer=None)
                write_settings(folder, settings)

    def load_lora(self, path: str | Path) -> str:
        """Attaches a LoRA file, replacing any other, and returns a one-line summary of it. `path`
        may be a hub id (`owner/repo`, `owner/repo:file`).

        Raises UserError for a file that is damaged or made for another model.
        """
        return str(read_lora(find_weights(path, lora_files), self.transformer, self.mesh))

    def unload_lora(self) -> None:
        """Removes the attached LoRA factors, if there are any."""
        remove_lora(self.transformer)

    def load_previewer(self, path: str | Path) -> None:
        """Loads the tiny autoencoder that draws previews (TAEF1 for FLUX.1, TAESD3 for Stable
        Diffusion 3): a converted folder, the common prefix of its two published files' names, or
        its hub id.

        Raises UserError if it is missing, damaged, or made for another model.
        """
        config = self.transformer.config
        self.previewer = read_previewer(path, config.latent_channels)

    def sigmas(
        self, height: int | None = None, width: int | None = None, steps: int | None = None
    ) -> np.ndarray:
        """The noise levels of a call with these arguments: float32 [steps + 1], from 1 down to 0.

        Sizes are in pixels; defaults are those of a call.
        """
        height, width = picture_size(height, width, self.settings.resolution)
        side = self._downscale * self.transformer.config.patch_size  # of a token
        steps = self.settings.steps if steps is None else steps
        return self.settings.schedule.sigmas(steps, (height // side) * (width // side))

    def timesteps(
        self, height: int | None = None, width: int | None = None, steps: int | None = None
    ) -> np.ndarray:
        """The timesteps of a call with these arguments: float32 [steps], from 1000 (noise) down."""
        return self.sigmas(height, width, steps)[:-1] * np.float32(MAX_TIMESTEP)

    def noise(
        self,
        count: int,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Float[Array, "b h w c"]:
        """The latents from which a call with these arguments draws `count` pictures, float32."""
        size = picture_size(height, width, self.settings.resolution)
        return noise(self.transformer.config, count, size, self._downscale, seed)

    @property
    def _downscale(self) -> int:
        return NO_DOWNSCALE if self.autoencoder is None else self.autoencoder.config.downscale

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of prompts; a warning is logged for each prompt that has to be truncated.

        Raises UserError if the pipeline has no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(
                f"this pipeline lacks a text encoder ({self.family.text_encoders}); add "
                "text_encoder/, text_encoder_2/, ... and their tokenizers beside its transformer, "
                "or from Python give prompt_embeds and pooled_prompt_embeds"
            )
        announce_cuts(self.tokenizer, prompts)
        graph, state = nnx.split(self.text_encoder)
        with on(self.mesh):
            return _encode(graph, state, self.tokenizer(prompts))

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        taca: TacaConfig | None = None,
        lora_strength: float = 1.0,
        prompt_embeds: Float[Array, "b t k"] | None = None,
        pooled_prompt_embeds: Float[Array, "b p"] | None = None,
        negative_prompt_embeds: Float[Array, "b t k"] | None = None,
        negative_pooled_prompt_embeds: Float[Array, "b p"] | None = None,
        latents: Float[Array, "b h w c"] | None = None,
        skip_layers: SkipLayers | Sequence[int] | None = None,
        output: Output = "pil",
        tiling: Tiling | None = TILING,
        trajectory: bool = False,
        callback: Callback | None = None,
        preview: Preview | None = None,
        progress: bool | None = None,
    ) -> PipelineOutput:
        """Draws pictures of `prompt` (one or several prompts, `num_images` pictures of each).

        Sizes are in pixels. A model with embedded guidance is given `guidance` as an input, and
        refuses `negative_prompt`; other models use `guidance` above 1 for classifier-free guidance
        against `negative_prompt` ("" by default; one for all, or one for each prompt). Picture i
        starts from the noise of `seed` + i, or of `seed`[i], or from `latents`. `taca` None is
        plain attention; attached LoRA factors act while TACA is active, at `lora_strength`.
        `skip_layers` adds skip-layer guidance to classifier-free guidance, for models that have it:
        it guides away from the model without those layers (7, 8, 9 of Stable Diffusion 3.5-Medium).
        It is a sequence of layers, or a SkipLayers, which also sets the strength and the range of
        steps.
        `tiling` sets how large pictures are decoded in overlapping tiles; None decodes at once.

        After each step, `callback(step, latents)` is called, and `preview(step, pictures)` with the
        predicted final pictures, decoded by the previewer (`load_previewer`). `progress` shows a
        bar on stderr; None shows it on a terminal only. None of these changes the result.

        Raises UserError for arguments that do not fit together.
        """
        family, config, settings = self.family, self.transformer.config, self.settings
        self._check_output(output)
        draw = drawer(preview, self.previewer, self.autoencoder, family.tiny_autoencoder)
        if guidance is None:
            guidance = settings.guidance
        check_guidance(guidance)
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be 1 or more")
        wanted = Prompt("prompt", prompt, prompt_embeds, pooled_prompt_embeds)
        positive = repeated(wanted.conditioning(config, self.encode_prompts), num_images)
        batch = positive.txt.shape[0]
        if family.embeds_guidance(config):
            if negative_prompt is not None or negative_prompt_embeds is not None:
                raise UserError("this model embeds its guidance and takes no negative prompt")
            positive = replace(positive, guidance=jnp.full(batch, guidance, jnp.float32))
            negative = None
        else:
            unwanted = Prompt(
                "negative_prompt",
                negative_prompt,
                negative_prompt_embeds,
                negative_pooled_prompt_embeds,
            )
            negative = negative_conditioning(
                unwanted, guidance, positive, num_images, config, self.encode_prompts
            )
        layers = family.skippable_layers(config)
        skip = skip_guidance(skip_layers, guidance, layers)
        downscale = self._downscale
        if latents is not None:
            x = given_latents(config, latents, batch, (height, width), downscale)
        else:
            x = self.noise(batch, height, width, seed)
        sigmas = self.sigmas(x.shape[1] * downscale, x.shape[2] * downscale, steps)
        if skip is not None:
            skip.announce(len(sigmas) - 1)
        plan = make_plan(sigmas, taca, lora_strength=lora_strength, skip=skip)
        with on(self.mesh), step_bar(len(sigmas) - 1, progress) as advance:
            x, seen = denoise(
                self.transformer,
                x,
                plan,
                positive,
                negative,
                jnp.float32(guidance),
                skip=None if skip is None else skip.mask(layers),
                trajectory=trajectory,
                watch=watcher(advance, callback, draw),
            )
        with on(self.mesh):
            return PipelineOutput(self._pictures(x, output, tiling), x, seen)

    def _check_output(self, output: str) -> None:
        """Raises UserError for an output that this pipeline cannot produce."""
        if output not in get_args(Output):
            known = ", ".join(get_args(Output))
            raise UserError(f"output is {output!r}; it must be one of {known}")
        if output != "latents" and self.autoencoder is None:
            raise UserError('this pipeline has no autoencoder; ask for output="latents"')

    def _pictures(
        self, latents: Float[Array, "b h w c"], output: Output, tiling: Tiling | None
    ) -> list[Image.Image] | np.ndarray | None:
        if output == "latents" or self.autoencoder is None:
            return None
        images = decode(self.autoencoder, latents, tiling)
        return images if output == "array" else to_pil(images)


@jax.jit(static_argnames=("graph",))
def _encode(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> Conditioning:
    return nnx.merge(graph, state)(tokens)
