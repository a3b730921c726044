"""The inputs of a pipeline call: checked, completed with defaults, and made into one batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from taca_jax.errors import UserError
from taca_jax.families.registry import family_of
from taca_jax.nn.conditioning import Conditioning
from taca_jax.sampling.loop import MAX_SEED, SkipLayers


def downscale_of(transformer: Any, autoencoder: Any | None) -> int:
    """Pixels per latent position of an autoencoder's config; where there is none, of that which the
    transformer's family has."""
    known = family_of(transformer).autoencoder if autoencoder is None else autoencoder
    return known.downscale


@dataclass(frozen=True)
class Prompt:
    """One or several prompts, or their embeddings, which need no text encoder.

    name: of the argument that gives the prompts, `prompt` or `negative_prompt`, for messages.
    """

    name: str
    text: str | Sequence[str] | None
    embeds: Float[Array, "b t k"] | None
    pooled: Float[Array, "b p"] | None

    @property
    def is_given(self) -> bool:
        return not (self.text is None and self.embeds is None and self.pooled is None)

    def conditioning(
        self, config: Any, encode: Callable[[Sequence[str]], Conditioning]
    ) -> Conditioning:
        """The text inputs of the transformer with this config; `encode` embeds prompts.

        Raises UserError unless either prompts or embeddings are given, and for embeddings whose
        shapes do not fit the transformer.
        """
        name, embeds, pooled = self.name, self.embeds, self.pooled
        if embeds is not None and pooled is None and not config.pooled_dim:
            pooled = jnp.zeros((len(embeds), 0))
        if (embeds is None) != (pooled is None) or (embeds is None) == (self.text is None):
            pooled_name = name.replace("prompt", "pooled_prompt_embeds")
            raise UserError(f"give either {name}, or {name}_embeds with {pooled_name}")
        if embeds is not None and pooled is not None:
            self._check_embeds(config, embeds, pooled)
            return Conditioning(jnp.asarray(embeds), jnp.asarray(pooled))
        prompts = [self.text] if isinstance(self.text, str) else list(self.text or ())
        if not prompts:
            raise UserError(f"{name} is an empty list; give one or more")
        return encode(prompts)

    def _check_embeds(self, config: Any, embeds: jax.Array, pooled: jax.Array) -> None:
        right = (
            embeds.ndim == 3
            and len(embeds) > 0
            and embeds.shape[2] == config.txt_dim
            and pooled.shape == (embeds.shape[0], config.pooled_dim)
        )
        if not right:
            raise UserError(
                f"{self.name}_embeds are {embeds.shape} and pooled {pooled.shape}; expected "
                f"(b, tokens, {config.txt_dim}) and (b, {config.pooled_dim}) of one batch size b"
            )


def check_guidance(guidance: float) -> None:
    """Raises UserError for a negative, infinite or undefined strength."""
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance is {guidance}; it must be 0 or more")


def check_negative(guidance: float, *, embedded: bool) -> None:
    """Raises UserError where a negative prompt has no effect; `embedded` says whether the model is
    given its guidance as an input."""
    if embedded:
        raise UserError(
            "this model embeds its guidance and takes no negative prompt; leave negative_prompt out"
        )
    if guidance <= 1:
        raise UserError(f"a negative prompt acts with guidance above 1; it is {guidance:g}")


def negative_conditioning(
    prompt: Prompt,
    guidance: float,
    positive: Conditioning,
    num_images: int,
    config: Any,
    encode: Callable[[Sequence[str]], Conditioning],
) -> Conditioning | None:
    """The negative conditioning of classifier-free guidance, one for each picture; None without it.

    The default is the empty prompt. Raises UserError if a negative prompt does not fit the positive
    one.
    """
    if guidance <= 1:
        return None
    if prompt.text is None and prompt.embeds is None:
        prompt = Prompt(prompt.name, "", None, prompt.pooled)
    negative = prompt.conditioning(config, encode)
    given, batch = negative.txt.shape[0], positive.txt.shape[0]
    if given not in (1, batch // num_images, batch):
        raise UserError(f"{given} negative prompts for {batch} pictures; give one")
    tokens, expected = negative.txt.shape[1], positive.txt.shape[1]
    if tokens != expected:
        raise UserError(f"negative_prompt_embeds have {tokens} tokens, prompt_embeds {expected}")
    return repeated(negative, batch // given)


def repeated(text: Conditioning, times: int) -> Conditioning:
    """The conditioning with each sample repeated `times` times in succession."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), text)


Tree = TypeVar("Tree")


def filled(samples: Tree, size: int) -> Tree:
    """Arrays over samples with copies of the last sample at their end, so that there are `size`."""

    def of(x: jax.Array) -> jax.Array:
        extra = size - x.shape[0]
        return jnp.concatenate([x, jnp.repeat(x[-1:], extra, axis=0)]) if extra else x

    return jax.tree.map(of, samples)


def skip_guidance(
    skip_layers: SkipLayers | Sequence[int] | None, guidance: float, layers: int
) -> SkipLayers | None:
    """The settings of skip-layer guidance for a model with this number of skippable `layers`.

    Raises UserError if the model has none, or if the settings would have no effect.
    """
    if skip_layers is None:
        return None
    if not layers:
        raise UserError("skip_layers was given; this model has no skip-layer guidance")
    if guidance <= 1:
        raise UserError(f"skip_layers acts with guidance above 1; it is {guidance:g}")
    if isinstance(skip_layers, SkipLayers):
        return skip_layers
    return SkipLayers(tuple(skip_layers))


def picture_size(height: int | None, width: int | None, resolution: int) -> tuple[int, int]:
    """The size in pixels; a side that is not given is the model's resolution."""
    return resolution if height is None else height, resolution if width is None else width


def check_size(config: Any, size: tuple[int, int], downscale: int) -> tuple[int, int]:
    """The rows and columns of the image tokens of a picture of (height, width) pixels.

    Raises UserError for a size that this transformer does not draw.
    """
    height, width = size
    multiple = downscale * config.patch_size
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise UserError(f"{height} x {width} pixels: both must be multiples of {multiple}")
    rows, columns = height // multiple, width // multiple
    family_of(config).check_grid(config, rows, columns)
    return rows, columns


def image_tokens(config: Any, size: tuple[int, int], downscale: int) -> int:
    """The number of image tokens of a (height, width) in pixels. Raises as `check_size` does."""
    return math.prod(check_size(config, size, downscale))


def noise(
    config: Any, batch: int, size: tuple[int, int], downscale: int, seed: int | Sequence[int]
) -> Float[Array, "b h w c"]:
    """Initial noise for pictures of (height, width) pixels, float32; sample i uses seed + i, or
    seed[i].

    Raises UserError for seeds or a size that are not allowed.
    """
    rows, columns = check_size(config, size, downscale)
    shape = (rows * config.patch_size, columns * config.patch_size, config.latent_channels)
    given = list(seed) if isinstance(seed, Sequence) else [seed]
    if not all(0 <= each <= MAX_SEED for each in given):
        raise UserError(f"seed is {seed}; it must be 0 to {MAX_SEED}")
    if isinstance(seed, Sequence) and len(given) != batch:
        raise UserError(f"{len(given)} seeds for {batch} pictures; give one for each")
    seeds = jnp.asarray(given) if isinstance(seed, Sequence) else jnp.arange(seed, seed + batch)
    return jax.vmap(lambda s: jax.random.normal(jax.random.key(s), shape))(seeds)


def given_latents(
    config: Any,
    latents: Float[Array, "b h w c"],
    batch: int,
    size: tuple[int | None, int | None],
    downscale: int,
) -> Float[Array, "b h w c"]:
    """The caller's initial latents, float32.

    Raises UserError if they do not fit the model, the prompts, or the (height, width) given.
    """
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
    height, width = size
    own = (latents.shape[1] * downscale, latents.shape[2] * downscale)
    if height not in (None, own[0]) or width not in (None, own[1]):
        raise UserError(
            f"height and width are {height} x {width}, and the latents make {own[0]} x "
            f"{own[1]} pixels; leave one of the two out"
        )
    family_of(config).check_grid(config, latents.shape[1] // patch, latents.shape[2] // patch)
    return jnp.asarray(latents, jnp.float32)
