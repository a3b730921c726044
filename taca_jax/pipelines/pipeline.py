"""From prompts to pictures: a transformer and what it needs around it."""

from collections.abc import Collection, Sequence
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
from taca_jax.autoencoders.tiling import TILING, Tiling
from taca_jax.config.fields import to_json
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import family_of
from taca_jax.formats.atomic import whole_folder
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.kinds import abstract_model
from taca_jax.nn.lora import remove_lora
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.mesh import on
from taca_jax.parallel.processes import is_first
from taca_jax.pipelines.decoding import Autoencoder, decode, to_pil
from taca_jax.pipelines.inputs import (
    NO_DOWNSCALE,
    Prompt,
    check_guidance,
    given_latents,
    negative_conditioning,
    noise,
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
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.lora_files import read_lora
from taca_jax.weights.pipeline_folders import (
    AUTOENCODER,
    ROLES,
    TRANSFORMER,
    PipelineSettings,
    Role,
    StoredPipeline,
    open_pipeline,
)
from taca_jax.weights.shipped import find_weights

Output = Literal["pil", "array", "latents"]

Precision = Literal["float32", "bfloat16"]


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


@dataclass(frozen=True)
class Variant:
    """One way of sampling a model: TACA's settings (None: plain) and the LoRA's strength."""

    name: str
    taca: TacaConfig | None
    lora_strength: float


class Pipeline:
    """A transformer with what it needs around it, of any family; parts may be absent where
    embeddings or latents are given instead."""

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
    ) -> Self:
        """The pipeline in a folder: `pipeline.json`, `transformer/`, and where present the text
        encoders (`text_encoder/`, `text_encoder_2/`, ...) and `autoencoder/`.

        `path` may also be the name of a model that comes with the package (`shapes_base`), or
        original weights that nobody has converted: a diffusers pipeline folder, or its authors'
        single file with what is beside it (`open_original`).

        `dtype` is of activations, and of parameters unless `param_dtype` says otherwise. Parameters
        go straight to their places on `mesh` (`parallel.mesh.make_mesh`), a tensor at a time; over
        it the pipeline then runs. Without one they go to the first device. `remat` matters to
        training only. `quantize` is what the kernels of the transformer's blocks are kept in,
        `int8`, `nf4` or `none` (as parameters are), and `quantize_text` those of T5's; they are
        encoded as they are read. `attention` is the implementation of the joint attention.

        Raises UserError where the pipeline or a part of it is missing, damaged, or of another kind
        of model.
        """
        options = LoadOptions(
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype or dtype),
            mesh=mesh,
            quantize=quantize,
            remat=remat,
            attention=attention,
        )
        return cls.from_stored(open_pipeline(path), options, quantize_text=quantize_text)

    @classmethod
    def from_stored(
        cls,
        stored: StoredPipeline,
        options: LoadOptions,
        *,
        quantize_text: Quantization = "none",
        only: Collection[Role] = ROLES,
    ) -> Self:
        """What `from_pretrained` makes of an opened pipeline.

        Of what `only` leaves out nothing is read; the transformer is then one of shapes.
        """
        config, family = stored.transformer.config, stored.family
        if cls.reads not in (None, family):
            raise UserError(
                f"{stored.where} is of kind {family.name}; {cls.__name__} reads {cls.reads.name}"
            )
        beside = replace(options, quantize="none", remat="none", attention="auto")
        autoencoder = stored.models.get(AUTOENCODER) if "autoencoder" in only else None
        if autoencoder is not None:
            given, expected = autoencoder.config.latent_channels, config.latent_channels
            if given != expected:
                raise UserError(
                    f"{autoencoder.where} has {given} latent channels, the transformer expects "
                    f"{expected}; it is of another model"
                )
        reading = stored.reading if "text" in only else None
        text_encoder, tokenizer = None, None
        if reading is not None:
            text_encoder, tokenizer = load_text(stored, reading, beside, quantize_text)
        if "transformer" in only:
            transformer = stored.transformer.load(options)
        else:
            transformer = abstract_model(config, dtype=options.dtype)
        return cls(
            transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            autoencoder=None if autoencoder is None else autoencoder.load(beside),
            settings=stored.settings,
            mesh=options.mesh,
        )

    def save(self, path: str | Path, *, dtype: Precision | None = None) -> None:
        """Writes the folder that `from_pretrained` reads, whole or not at all; a pipeline's folder
        that was there is replaced, and LoRA factors are left out.

        Of several processes all must call this. Raises UserError where `path` holds something else,
        or cannot be written, and for quantised models.
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
                (folder / PIPELINE_FILE).write_text(to_json(settings) + "\n")

    def load_lora(self, path: str | Path) -> str:
        """Attaches a LoRA file in place of any other; returns a line that says what it holds.

        Raises UserError for a file that is damaged or made for another model.
        """
        return str(read_lora(find_weights(path), self.transformer, self.mesh))

    def unload_lora(self) -> None:
        """Takes LoRA factors off; without any this does nothing."""
        remove_lora(self.transformer)

    def load_previewer(self, path: str | Path) -> None:
        """Reads the tiny autoencoder that draws previews (TAEF1 for FLUX.1, TAESD3 for Stable
        Diffusion 3): a converted folder, or the beginning of the names of its two published files.

        Raises UserError where it is missing, damaged, or of another model.
        """
        config = self.transformer.config
        self.previewer = read_previewer(Path(path), config.latent_channels)

    def timesteps(
        self, height: int | None = None, width: int | None = None, steps: int | None = None
    ) -> np.ndarray:
        """The times that a call of that size in pixels visits, float32 [steps], 1000 (noise) first;
        what is None is as in a call."""
        settings, config = self.settings, self.transformer.config
        sides = (settings.resolution if side is None else side for side in (height, width))
        tokens = 1
        for side in sides:
            tokens *= side // (self._downscale * config.patch_size)
        return self._sigmas(steps, tokens)[:-1] * np.float32(MAX_TIMESTEP)

    @property
    def _downscale(self) -> int:
        return NO_DOWNSCALE if self.autoencoder is None else self.autoencoder.config.downscale

    def _sigmas(self, steps: int | None, tokens: int) -> np.ndarray:
        return self.settings.schedule.sigmas(
            self.settings.steps if steps is None else steps, tokens
        )

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of prompts; a warning says what of one is too long to be read.

        Raises UserError where the pipeline lacks a text encoder.
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
        output: Output = "pil",
        tiling: Tiling | None = TILING,
        trajectory: bool = False,
        callback: Callback | None = None,
        preview: Preview | None = None,
        progress: bool | None = None,
    ) -> PipelineOutput:
        """Pictures of `prompt` (one or several, each `num_images` times).

        Sizes are in pixels. `guidance` is embedded where the model takes it; other models use it
        for classifier-free guidance against `negative_prompt` ("" by default; one for all, or one
        for each prompt) when it is above 1.
        A model with embedded guidance refuses `negative_prompt`. Picture i starts from the noise of
        `seed` + i, or from `latents`. `taca` None is plain attention; attached LoRA factors act
        while TACA does, at `lora_strength`. `skip_layers` adds skip-layer guidance to
        classifier-free guidance, for models that have it: away from the model without those layers
        (7, 8, 9 of Stable Diffusion 3.5-Medium); layers, or SkipLayers for its strength and time
        too. `tiling` says how large pictures are decoded in squares, None that they never are.

        After each step, `callback(step, latents)` is called, and `preview(step, pictures)` with
        what each picture is predicted to become, drawn by the previewer (`load_previewer`). A bar
        on stderr shows `progress`, by default on a terminal only. None of these changes what is
        drawn.

        Raises UserError for input that does not fit together.
        """
        family, config, settings = self.family, self.transformer.config, self.settings
        self._check_output(output)
        draw = drawer(preview, self.previewer, self.autoencoder, family.tiny_autoencoder)
        if guidance is None:
            guidance = settings.guidance
        check_guidance(guidance)
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be 1 or more")
        asked = Prompt("prompt", prompt, prompt_embeds, pooled_prompt_embeds)
        positive = repeated(asked.conditioning(config, self.encode_prompts), num_images)
        batch = positive.txt.shape[0]
        away = Prompt(
            "negative_prompt",
            negative_prompt,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        negative = None
        if family.embeds_guidance(config):
            if negative_prompt is not None or negative_prompt_embeds is not None:
                raise UserError("this model embeds its guidance and takes no negative prompt")
            positive = replace(positive, guidance=jnp.full(batch, guidance, jnp.float32))
        else:
            negative = negative_conditioning(
                away, guidance, positive, num_images, config, self.encode_prompts
            )
        layers = family.skippable_layers(config)
        skip = skip_guidance(skip_layers, guidance, layers)
        downscale = self._downscale
        if latents is not None:
            x = given_latents(config, latents, batch, (height, width), downscale, family)
        else:
            size = (
                settings.resolution if height is None else height,
                settings.resolution if width is None else width,
            )
            x = noise(config, batch, size, downscale, seed, family)
        sigmas = self._sigmas(steps, x.shape[1] * x.shape[2] // config.patch_size**2)
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
        """Before anything is drawn that could not be given."""
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
