"""From prompts to pictures: a transformer with its text encoders, tokenizers and autoencoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image

from taca_jax.autoencoders.tiling import TILING, Tiling
from taca_jax.errors import UserError
from taca_jax.nn.conditioning import Conditioning
from taca_jax.parallel.batches import filled_size
from taca_jax.parallel.mesh import on
from taca_jax.parallel.processes import on_host, spans_processes
from taca_jax.pipelines.decoding import Output, check_output, decode, to_pil
from taca_jax.pipelines.image_inputs import (
    STRENGTH,
    Picture,
    encode,
    first_step,
    noised,
    read_images,
)
from taca_jax.pipelines.inputs import (
    Prompt,
    check_guidance,
    check_negative,
    check_size,
    downscale_of,
    filled,
    given_latents,
    image_tokens,
    negative_conditioning,
    noise,
    picture_size,
    repeated,
    skip_guidance,
)
from taca_jax.pipelines.loras import acting_loras
from taca_jax.pipelines.models import PipelineModels
from taca_jax.pipelines.previews import (
    Callback,
    Preview,
    Previewer,
    drawer,
    read_previewer,
    watcher,
)
from taca_jax.pipelines.progress import step_bar
from taca_jax.pipelines.text import lacks_encoders
from taca_jax.sampling.loop import Sampled, SkipLayers, Trajectory, denoise, make_plan
from taca_jax.sampling.solvers import Sampler
from taca_jax.taca import MAX_TIMESTEP, TacaConfig
from taca_jax.text.tokenizers import announce_cuts


class Embeds(TypedDict):
    """Arguments of a call: embeddings in place of prompts."""

    prompt_embeds: Float[Array, "b t k"]
    pooled_prompt_embeds: Float[Array, "b p"]
    negative_prompt_embeds: NotRequired[Float[Array, "b t k"]]
    negative_pooled_prompt_embeds: NotRequired[Float[Array, "b p"]]


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


class Pipeline(PipelineModels):
    """A transformer of any family with its text encoder, tokenizer and autoencoder.

    The text encoder may be absent when calls give embeddings, the autoencoder when they ask for
    latents.
    """

    previewer: Previewer | None = None

    def load_previewer(self, path: str | Path) -> None:
        """Loads the tiny autoencoder that draws previews (TAEF1 for FLUX.1, TAESD3 for Stable
        Diffusion 3): a converted folder, or the common prefix of its two published files' names.

        Raises UserError if it is missing, damaged, or made for another model.
        """
        self.previewer = read_previewer(path, self.config.latent_channels, self.mesh)

    def sigmas(
        self,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        strength: float | None = None,
    ) -> np.ndarray:
        """The noise levels of a call with these arguments: float32 [steps + 1], from 1 down to 0.

        Sizes are in pixels; defaults are those of a call. `strength` is that of a call with an
        image: the noise levels are then those of the steps that are taken. Raises UserError for one
        that is not above 0 and at most 1.
        """
        size = picture_size(height, width, self.settings.resolution)
        steps = self.settings.steps if steps is None else steps
        tokens = image_tokens(self.config, size, self._downscale)
        sigmas = self.settings.schedule.sigmas(steps, tokens)
        return sigmas if strength is None else sigmas[first_step(steps, strength) :]

    def timesteps(
        self,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        strength: float | None = None,
    ) -> np.ndarray:
        """The timesteps of a call with these arguments: float32 [steps], from 1000 (noise) down."""
        return self.sigmas(height, width, steps, strength)[:-1] * np.float32(MAX_TIMESTEP)

    def noise(
        self,
        count: int,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Float[Array, "b h w c"]:
        """The latents from which a call with these arguments draws `count` pictures, float32."""
        size = picture_size(height, width, self.settings.resolution)
        return noise(self.config, count, size, self._downscale, seed)

    @property
    def _downscale(self) -> int:
        return downscale_of(self.config, self.autoencoder_config)

    def encode_images(
        self,
        image: Picture | Sequence[Picture],
        height: int | None = None,
        width: int | None = None,
    ) -> Float[np.ndarray, "b h w c"]:
        """The latents of pictures, or of picture files, as a call with this `image` starts from:
        cropped around their centres to the aspect of the size, resized, and encoded.

        Raises UserError for what is no picture, and if the pipeline has no autoencoder.
        """
        size = picture_size(height, width, self.settings.resolution)
        check_size(self.config, size, self._downscale)
        pictures = read_images(image, size)
        if self.autoencoder_config is None:
            raise UserError("this pipeline has no autoencoder, which image= needs")
        autoencoder = self.autoencoder
        assert autoencoder is not None  # which has been checked
        with on(self.mesh):
            return on_host(encode(autoencoder, pictures))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of prompts; a warning is logged for each prompt that has to be truncated.

        Raises UserError if the pipeline has no text encoder.
        """
        if not self.has_text_encoder or self.tokenizer is None:
            raise lacks_encoders(self.family)
        announce_cuts(self.tokenizer, prompts)
        tokens = self.tokenizer(prompts)  # what cannot be read is refused before encoders are read
        graph, state = nnx.split(self.text_encoder)
        with on(self.mesh):
            return _encode(graph, state, tokens)

    def embeds(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        guidance: float | None = None,
    ) -> Embeds:
        """What prompts become: the arguments of calls that draw with this `guidance` without
        reading prompts again, which saves a staged pipeline from reading its text encoders for each
        call.

        Raises UserError as a call does.
        """
        wanted = Prompt("prompt", prompt, None, None)
        unwanted = Prompt("negative_prompt", negative_prompt, None, None)
        strength = self._guidance(guidance)
        positive, negative = self._text(wanted, unwanted, strength, 1)
        found = Embeds(prompt_embeds=positive.txt, pooled_prompt_embeds=positive.pooled)
        if negative is not None:
            found["negative_prompt_embeds"] = negative.txt
            found["negative_pooled_prompt_embeds"] = negative.pooled
        return found

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
        lora_strength: float | Sequence[float] = 1.0,
        prompt_embeds: Float[Array, "b t k"] | None = None,
        pooled_prompt_embeds: Float[Array, "b p"] | None = None,
        negative_prompt_embeds: Float[Array, "b t k"] | None = None,
        negative_pooled_prompt_embeds: Float[Array, "b p"] | None = None,
        latents: Float[Array, "b h w c"] | None = None,
        image: Picture | Sequence[Picture] | Float[Any, "b h w c"] | None = None,
        strength: float | None = None,
        skip_layers: SkipLayers | Sequence[int] | None = None,
        sampler: Sampler = "euler",
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
        starts from the noise of `seed` + i, or of `seed`[i], or from `latents`. With an `image`
        (a picture, its file, its latents of `encode_images`, or one for each picture) that noise is
        mixed with it, and only the last `strength` (0.6) of the steps are taken. `taca` None is
        plain attention. LoRAs act always or while TACA is active, as they were loaded, each at its
        strength times `lora_strength`: one number for all, or one for each.
        `skip_layers` adds skip-layer guidance to classifier-free guidance, for models that have it:
        it guides away from the model without those layers (7, 8, 9 of Stable Diffusion 3.5-Medium).
        It is a sequence of layers, or a SkipLayers, which also sets the strength and the range of
        steps.
        `sampler` is `euler`, `heun` (two evaluations a step) or `dpm++2m`.
        `tiling` sets how large pictures are decoded in overlapping tiles; None decodes at once.

        After each step, `callback(step, latents)` is called, and `preview(step, pictures)` with the
        predicted final pictures, decoded by the previewer (`load_previewer`). `progress` shows a
        bar on stderr; None shows it on a terminal only. None of these changes the result.

        Raises UserError for arguments that do not fit together.
        """
        check_output(output, self.autoencoder_config)
        # Only where it may draw previews: in stages reading it is a turn of its own.
        own = self.autoencoder if preview is not None and self.previewer is None else None
        draw = drawer(preview, self.previewer, own, self.family.tiny_autoencoder)
        guidance = self._guidance(guidance)
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be 1 or more")
        wanted = Prompt("prompt", prompt, prompt_embeds, pooled_prompt_embeds)
        unwanted = Prompt(
            "negative_prompt",
            negative_prompt,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        positive, negative = self._text(wanted, unwanted, guidance, num_images)
        batch = positive.txt.shape[0]
        layers = self.family.skippable_layers(self.config)
        skip = skip_guidance(skip_layers, guidance, layers)
        downscale = self._downscale
        if latents is not None:
            x = given_latents(self.config, latents, batch, (height, width), downscale)
        else:
            x = self.noise(batch, height, width, seed)
        size = (x.shape[1] * downscale, x.shape[2] * downscale)
        if image is None:
            if strength is not None:
                raise UserError(f"strength is {strength:g} without image=; leave it out")
            sigmas = self.sigmas(*size, steps)
        else:
            sigmas = self.sigmas(*size, steps, STRENGTH if strength is None else strength)
            is_array = isinstance(image, np.ndarray | jax.Array)
            x = noised(image if is_array else self.encode_images(image, *size), x, sigmas[0])
        if skip is not None:
            skip.announce(len(sigmas) - 1)
        loras = acting_loras(self.transformer, self.loras, lora_strength)
        plan = make_plan(sigmas, taca, loras=loras, skip=skip, sampler=sampler)
        # Devices share a batch only if it divides evenly: copies of its last sample fill it up.
        size = filled_size(self.mesh, batch, 1 if negative is None else 2)
        together = spans_processes(self.mesh)
        with on(self.mesh), step_bar(len(sigmas) - 1, progress, together=together) as advance:
            watch = watcher(advance, callback, draw)
            x, seen = denoise(
                self.transformer,
                filled(x, size),
                plan,
                filled(positive, size),
                filled(negative, size),
                jnp.float32(guidance),
                skip=None if skip is None else skip.mask(layers),
                trajectory=trajectory,
                watch=watch if watch is None or size == batch else partial(_of_first, batch, watch),
            )
            if size > batch:
                x, seen = x[:batch], jax.tree.map(lambda steps: steps[:, :batch], seen)
        images = None if output == "latents" else self.decode(x, output=output, tiling=tiling)
        return PipelineOutput(images, x, seen)

    def decode(
        self,
        latents: Float[Array, "b h w c"],
        *,
        output: Literal["pil", "array"] = "pil",
        tiling: Tiling | None = TILING,
    ) -> list[Image.Image] | np.ndarray:
        """The pictures of final latents, as a call makes them; `output` and `tiling` are a call's.

        Raises UserError if the pipeline has no autoencoder.
        """
        check_output(output, self.autoencoder_config)
        autoencoder = self.autoencoder
        assert autoencoder is not None  # which has been checked
        with on(self.mesh):
            images = decode(autoencoder, latents, tiling)
        return images if output == "array" else to_pil(images)

    def _guidance(self, guidance: float | None) -> float:
        """The strength of a call's guidance. Raises UserError for one that is not allowed."""
        guidance = self.settings.guidance if guidance is None else guidance
        check_guidance(guidance)
        return guidance

    def _text(
        self, wanted: Prompt, unwanted: Prompt, guidance: float, num_images: int
    ) -> tuple[Conditioning, Conditioning | None]:
        """The transformer's inputs from prompts, and those of classifier-free guidance if it is on,
        for each picture. Raises UserError for prompts that do not fit the model."""
        config = self.config
        embedded = self.family.embeds_guidance(config)
        if unwanted.is_given:
            check_negative(guidance, embedded=embedded)
        positive = repeated(wanted.conditioning(config, self.encode_prompts), num_images)
        if not embedded:
            negative = negative_conditioning(
                unwanted, guidance, positive, num_images, config, self.encode_prompts
            )
            return positive, negative
        strengths = jnp.full(positive.txt.shape[0], guidance, jnp.float32)
        return replace(positive, guidance=strengths), None


def _of_first(count: int, watch: Callable[[int, Sampled], None], step: int, now: Sampled) -> None:
    """Watches the first `count` samples, without those that fill up the batch. Trajectories are
    left out, which watching does not need."""
    watch(step, Sampled(latents=now.latents[:count], x0=now.x0[:count], trajectory=None))


@jax.jit(static_argnames=("graph",))
def _encode(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> Conditioning:
    return nnx.merge(graph, state)(tokens)
