"""Pictures to start from (img2img): read, encoded, and noised to where the remaining steps start.

As in diffusers' FluxImg2ImgPipeline and StableDiffusion3Img2ImgPipeline: of n steps the last
strength * n are taken, rounded up, from sigma * noise + (1 - sigma) * latents. Two things differ: a
picture is cropped to the aspect of the size instead of being stretched, and its latents are the
mean of what the autoencoder says, not a sample, so that only the seed's noise is random.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from taca_jax.autoencoders.kinds import Autoencoder
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.decoding import fit_picture, read_picture
from taca_jax.errors import UserError

STRENGTH = 0.6
"""Where none is given, as in diffusers."""

Picture = str | Path | Image.Image
"""A picture's file, or the picture."""


def check_strength(strength: float) -> None:
    """Raises UserError for a strength that is not above 0 and at most 1."""
    if not 0 < strength <= 1:
        raise UserError(
            f"strength is {strength:g}; it must be above 0, which would leave the image as it is, "
            "and at most 1, which leaves nothing of it"
        )


def first_step(steps: int, strength: float) -> int:
    """The first of the steps that are taken, from 0; at least the last one is."""
    check_strength(strength)
    return min(int(steps - steps * strength), steps - 1)


def read_image(image: Picture, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture, upright, cropped around its centre to the aspect of (height, width), and resized.

    Raises UserError for a file that is missing or no picture.
    """
    if isinstance(image, Image.Image):
        return fit_picture(image, size)
    try:
        return read_picture(Path(image), size)
    except BadExampleError as error:
        raise UserError(
            f"image={image} cannot be read ({error}); give a PNG, JPEG or WebP file"
        ) from None


def read_images(
    images: Picture | Sequence[Picture], size: tuple[int, int]
) -> UInt8[np.ndarray, "b H W 3"]:
    """One picture or several, as `read_image` reads them."""
    several = [images] if isinstance(images, Picture) else images
    return np.stack([read_image(each, size) for each in several])


def encode(
    autoencoder: Autoencoder, images: UInt8[np.ndarray, "b H W 3"]
) -> Float[Array, "b h w c"]:
    """The latents of pictures, float32; of a KL autoencoder their mean."""
    graph, state = nnx.split(autoencoder)
    return _encode(graph, state, images)


def noised(
    latents: Float[Any, "b h w c"], noise: Float[Array, "n h w c"], sigma: np.float32
) -> Float[Array, "n h w c"]:
    """The latents at a noise level, of one picture for all or of one for each.

    Raises UserError if they fit the noise in neither way.
    """
    if latents.ndim != 4 or latents.shape[1:] != noise.shape[1:]:
        raise UserError(f"the image's latents are {latents.shape}; expected {noise.shape}")
    if len(latents) not in (1, len(noise)):
        raise UserError(f"{len(latents)} images for {len(noise)} pictures; give one")
    return sigma * noise + (1 - sigma) * jnp.asarray(latents, jnp.float32)


@jax.jit(static_argnames=("graph",))
def _encode(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> Float[Array, "b h w c"]:
    pixels = images.astype(jnp.float32) / 127.5 - 1
    return nnx.merge(graph, state).encode(pixels).astype(jnp.float32)
