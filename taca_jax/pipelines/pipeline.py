"""What the pipelines of all models share: their folder, their parts, and sampling."""

import math
from collections.abc import Collection, Sequence
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

from taca_jax.autoencoders.tiling import TILING, Tiling
from taca_jax.config.fields import to_json
from taca_jax.errors import UserError
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.lora import linears, remove_lora
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.mesh import on
from taca_jax.parallel.rules import placement
from taca_jax.pipelines.decoding import Autoencoder, decode, to_pil
from taca_jax.pipelines.previews import (
    Callback,
    Preview,
    Previewer,
    find_previewer,
    read_previewer,
    watcher,
)
from taca_jax.pipelines.progress import step_bar
from taca_jax.pipelines.text import Load, encoder_parts, save_tokenizers
from taca_jax.sampling.loop import MAX_SEED, SkipLayers, Trajectory, denoise, make_plan
from taca_jax.taca import TacaConfig
from taca_jax.text.encoders import FluxText, SD3Text, encode
from taca_jax.text.t5 import T5Config, T5Encoder
from taca_jax.text.tokenizers import Tokenizer, announce_cuts
from taca_jax.weights.folders import PIPELINE_FILE, abstract_model, kind_of, save_model
from taca_jax.weights.lora_files import read_lora
from taca_jax.weights.pipeline_folders import (
    AUTOENCODER,
    ROLES,
    TRANSFORMER,
    Part,
    Parts,
    PipelineSettings,
    Role,
    open_parts,
)
from taca_jax.weights.shipped import find_weights

TextEncoder = T5Encoder | FluxText | SD3Text

Output = Literal["pil", "array", "latents"]


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


class Pipeline:
    """A transformer with what it needs around it; parts may be absent where embeddings or latents
    are given instead. What differs from model to model is in the classes of `flux` and `sd3`."""

    kind: ClassVar[str]
    """Of the transformer, as in its config.json."""
    text_encoders: ClassVar[str]
    """What such a model reads prompts with, in words."""
    has_skip_layers: ClassVar[bool]
    """Whether there is skip-layer guidance."""

    @classmethod
    def _load_text(
        cls, parts: Parts, load: Load, config: Any
    ) -> tuple[TextEncoder, Tokenizer] | None:
        """What reads prompts; None where a part of it is left out."""
        raise NotImplementedError

    def _check_grid(self, rows: int, columns: int) -> None:
        """Raises UserError where the model has no positions for so many tokens."""

    def _embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the transformer."""
        return False

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

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        *,
        param_dtype: Literal["float32", "bfloat16"] | None = None,
        mesh: Mesh | None = None,
        remat: Remat = "none",
        quantize: Quantization = "none",
        quantize_text: Quantization = "none",
    ) -> Self:
        """The pipeline in a folder: `pipeline.json`, `transformer/`, and where present the text
        encoders (`text_encoder/`, `text_encoder_2/`, ...) and `autoencoder/`.

        `path` may also be the name of a model that comes with the package (`shapes_base`), or an
        original that nobody has converted: a diffusers pipeline folder, or a single file of Black
        Forest Labs' or Stability AI's with what is beside it (`open_original`).

        `dtype` is of activations, and of parameters unless `param_dtype` says otherwise. Parameters
        go straight to their places on `mesh` (`sharding.make_mesh`), a tensor at a time; over it
        the pipeline then runs. Without one they go to the first device. `remat` matters to training
        only. `quantize` is what the kernels of the transformer's blocks are kept in, `int8`, `nf4`
        or `none` (as parameters are), and `quantize_text` those of T5's; they are encoded as they
        are read.

        Raises UserError where the pipeline or a part of it is missing, damaged, or of another kind
        of model.
        """
        parts = open_parts(find_weights(path))
        return cls.from_parts(
            parts,
            dtype,
            param_dtype=param_dtype,
            mesh=mesh,
            remat=remat,
            quantize=quantize,
            quantize_text=quantize_text,
        )

    @classmethod
    def from_parts(
        cls,
        parts: Parts,
        dtype: Literal["float32", "bfloat16"],
        *,
        param_dtype: Literal["float32", "bfloat16"] | None,
        mesh: Mesh | None,
        remat: Remat,
        quantize: Quantization,
        quantize_text: Quantization,
        only: Collection[Role] = ROLES,
    ) -> Self:
        """What `from_pretrained` makes of an opened pipeline.

        Of what `only` leaves out nothing is read; the transformer is then one of shapes.
        """

        def load(part: Part, remat: Remat = "none", quantize: Quantization = "none") -> Any:
            return part.load(
                dtype=jnp.dtype(dtype),
                param_dtype=jnp.dtype(param_dtype or dtype),
                place=placement(mesh),
                remat=remat,
                quantize=quantize,
            )

        def load_text(part: Part) -> Any:
            is_t5 = isinstance(part.config, T5Config)
            return load(part, quantize=quantize_text if is_t5 else "none")

        config = parts.models[TRANSFORMER].config
        if kind_of(config) != cls.kind:
            raise UserError(
                f"{parts.where} is of kind {kind_of(config)}; {cls.__name__} reads {cls.kind}"
            )
        autoencoder = parts.models.get(AUTOENCODER) if "autoencoder" in only else None
        if autoencoder is not None:
            given, expected = autoencoder.config.latent_channels, config.latent_channels
            if given != expected:
                raise UserError(
                    f"{autoencoder.where} has {given} latent channels, the transformer expects "
                    f"{expected}; it is of another model"
                )
        text = cls._load_text(parts, load_text, config) if "text" in only else None
        text_encoder, tokenizer = text or (None, None)
        if "transformer" in only:
            transformer = load(parts.models[TRANSFORMER], remat, quantize)
        else:
            transformer = abstract_model(config, dtype=jnp.dtype(dtype))
        return cls(
            transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            autoencoder=None if autoencoder is None else load(autoencoder),
            settings=parts.settings,
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
        (path / PIPELINE_FILE).write_text(to_json(settings) + "\n")

    def load_lora(self, path: str | Path) -> str:
        """Attaches a LoRA file in place of any other; returns a line that says what it holds.

        Raises UserError for a file that is damaged or made for another model.
        """
        before = [
            (layer, layer.lora_a, layer.lora_b, layer.lora_alpha_over_rank)
            for _, layer in linears(self.transformer)
        ]
        self.unload_lora()
        try:
            said = str(read_lora(find_weights(path), self.transformer))
        except BaseException:
            for layer, a, b, strength in before:
                layer.lora_a, layer.lora_b, layer.lora_alpha_over_rank = a, b, strength
            raise
        if (place := placement(self.mesh)) is not None:
            for name, layer in linears(self.transformer):
                for factor, param in (("lora_a", layer.lora_a), ("lora_b", layer.lora_b)):
                    if param is not None:
                        where = place(self.kind, f"{name}.{factor}", param.shape)
                        param.set_value(jax.device_put(param.get_value(), where))
        return said

    def unload_lora(self) -> None:
        """Takes LoRA factors off; without any this does nothing."""
        remove_lora(self.transformer)

    def load_previewer(self, path: str | Path) -> None:
        """Reads the tiny autoencoder that draws previews: TAEF1 for FLUX.1, TAESD3 for Stable
        Diffusion 3; a converted folder, or the beginning of the names of its two published files.

        Raises UserError where it is missing, damaged, or of another model.
        """
        config = self.transformer.config
        self.previewer = read_previewer(Path(path), config.latent_channels)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of prompts; a warning says what of one is too long to be read.

        Raises UserError where the pipeline lacks a text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(
                f"this pipeline lacks a text encoder ({self.text_encoders}); add text_encoder/, "
                "text_encoder_2/, ... and their tokenizers beside its transformer, or from Python "
                "give prompt_embeds and pooled_prompt_embeds"
            )
        announce_cuts(self.tokenizer, prompts)
        graph, state = nnx.split(self.text_encoder)
        with on(self.mesh):
            return _encode(graph, state, self.tokenizer(prompts), self.tokenizer.pad_id)

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
        while TACA does, at `lora_strength`. `skip_layers` adds skip-layer guidance to Stable
        Diffusion 3's classifier-free one, away from the model without those layers (7, 8, 9 of
        3.5-Medium): layers, or SkipLayers for its strength and time too. `tiling` says how large
        pictures are decoded in squares, None that they never are.

        After each step, `callback(step, latents)` is called, and `preview(step, pictures)` with
        what each picture is predicted to become, drawn by the previewer (`load_previewer`). A bar
        on stderr shows `progress`, by default on a terminal only. None of these changes what is
        drawn.

        Raises UserError for input that does not fit together.
        """
        self._check_output(output)
        previewer = None
        if preview is not None:
            previewer = find_previewer(self.previewer, self.autoencoder)
        if guidance is None:
            guidance = self.settings.guidance
        if not 0 <= guidance < math.inf:
            raise UserError(f"guidance is {guidance}; it must be 0 or more")
        positive = self._positive(prompt, prompt_embeds, pooled_prompt_embeds, num_images)
        batch = positive.txt.shape[0]
        negative = None
        if self._embeds_guidance():
            if negative_prompt is not None or negative_prompt_embeds is not None:
                raise UserError("this model embeds its guidance and takes no negative prompt")
            positive = replace(positive, guidance=jnp.full(batch, guidance, jnp.float32))
        else:
            negative = self._negative(
                negative_prompt,
                negative_prompt_embeds,
                negative_pooled_prompt_embeds,
                guidance,
                positive,
                num_images,
            )
        skip = self._skip(skip_layers, guidance)
        x = self._noise(latents, batch, height, width, seed)
        sigmas = self.settings.schedule.sigmas(
            self.settings.steps if steps is None else steps,
            x.shape[1] * x.shape[2] // self.transformer.config.patch_size**2,
        )
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
                skip=None if skip is None else skip.mask(self.transformer.config.num_layers),
                trajectory=trajectory,
                watch=watcher(advance, callback, preview, previewer),
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

    def _skip(
        self, skip_layers: SkipLayers | Sequence[int] | None, guidance: float
    ) -> SkipLayers | None:
        """Skip-layer guidance. Raises UserError where there is none or it would not act."""
        if skip_layers is None:
            return None
        if not self.has_skip_layers:
            raise UserError("skip_layers is of Stable Diffusion 3; this model has no such guidance")
        if guidance <= 1:
            raise UserError(f"skip_layers acts with guidance above 1; it is {guidance:g}")
        if isinstance(skip_layers, SkipLayers):
            return skip_layers
        return SkipLayers(tuple(skip_layers))

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
            self._check_embeds(embeds, pooled, name)
            return Conditioning(jnp.asarray(embeds), jnp.asarray(pooled))
        assert prompt is not None
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError(f"{name} is an empty list; give one or more")
        return self.encode_prompts(prompts)

    def _check_embeds(self, embeds: jax.Array, pooled: jax.Array, name: str) -> None:
        config = self.transformer.config
        right = (
            embeds.ndim == 3
            and len(embeds) > 0
            and embeds.shape[2] == config.txt_dim
            and pooled.shape == (embeds.shape[0], config.pooled_dim)
        )
        if not right:
            raise UserError(
                f"{name}_embeds are {embeds.shape} and pooled {pooled.shape}; expected "
                f"(b, tokens, {config.txt_dim}) and (b, {config.pooled_dim}) of one batch size b"
            )

    def _negative(
        self,
        prompt: str | Sequence[str] | None,
        embeds: Float[Array, "b t k"] | None,
        pooled: Float[Array, "b p"] | None,
        guidance: float,
        positive: Conditioning,
        num_images: int,
    ) -> Conditioning | None:
        """What classifier-free guidance goes away from, as many as pictures; None without it.

        Without a prompt it is the empty one. Raises UserError where something is given that does
        not act.
        """
        if guidance <= 1:
            if prompt is not None or embeds is not None or pooled is not None:
                raise UserError(f"a negative prompt acts with guidance above 1; it is {guidance:g}")
            return None
        text = "" if prompt is None and embeds is None else prompt
        negative = self._conditioning(text, embeds, pooled, "negative_prompt")
        given, batch = negative.txt.shape[0], positive.txt.shape[0]
        if given not in (1, batch // num_images, batch):
            raise UserError(f"{given} negative prompts for {batch} pictures; give one")
        tokens, expected = negative.txt.shape[1], positive.txt.shape[1]
        if tokens != expected:
            raise UserError(
                f"negative_prompt_embeds have {tokens} tokens, prompt_embeds {expected}"
            )
        return _repeated(negative, batch // given)

    def _positive(
        self,
        prompt: str | Sequence[str] | None,
        embeds: Float[Array, "b t k"] | None,
        pooled: Float[Array, "b p"] | None,
        num_images: int,
    ) -> Conditioning:
        """The prompts, each as many times as it has pictures."""
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be 1 or more")
        return _repeated(self._conditioning(prompt, embeds, pooled, "prompt"), num_images)

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
                or 0 in latents.shape
            ):
                raise UserError(
                    f"latents are {latents.shape}; expected {batch} of {channels} channels, "
                    f"height and width multiples of {patch}"
                )
            size = (latents.shape[1] * downscale, latents.shape[2] * downscale)
            if height not in (None, size[0]) or width not in (None, size[1]):
                raise UserError(
                    f"height and width are {height} x {width}, and the latents make {size[0]} x "
                    f"{size[1]} pixels; leave one of the two out"
                )
            self._check_grid(latents.shape[1] // patch, latents.shape[2] // patch)
            return jnp.asarray(latents, jnp.float32)
        height = self.settings.resolution if height is None else height
        width = self.settings.resolution if width is None else width
        multiple = downscale * config.patch_size
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise UserError(f"{height} x {width} pixels: both must be multiples of {multiple}")
        self._check_grid(height // multiple, width // multiple)
        shape = (height // downscale, width // downscale, config.latent_channels)
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed is {seed}; it must be 0 to {MAX_SEED}")
        seeds = jnp.arange(seed, seed + batch)
        return jax.vmap(lambda s: jax.random.normal(jax.random.key(s), shape))(seeds)

    def _pictures(
        self, latents: Float[Array, "b h w c"], output: Output, tiling: Tiling | None
    ) -> list[Image.Image] | np.ndarray | None:
        if output == "latents":
            return None
        assert self.autoencoder is not None  # _check_output saw to it
        images = decode(self.autoencoder, latents, tiling)
        return images if output == "array" else to_pil(images)


def _repeated(text: Conditioning, times: int) -> Conditioning:
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), text)


@jax.jit(static_argnames=("graph", "pad_id"))
def _encode(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, pad_id: int) -> Conditioning:
    return encode(nnx.merge(graph, state), tokens, pad_id)
