"""Latents to pictures: at once or in tiles, as arrays or PIL images."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from taca_jax.autoencoders.kinds import Autoencoder, AutoencoderConfig
from taca_jax.autoencoders.pixels import Pixels
from taca_jax.autoencoders.tiling import Tiling, decode_in_tiles
from taca_jax.errors import UserError
from taca_jax.parallel.mesh import constrain_samples
from taca_jax.parallel.processes import on_host

Output = Literal["pil", "array", "latents"]
"""What a pipeline makes of its latents."""


def check_output(output: str, autoencoder: AutoencoderConfig | None) -> None:
    """Raises UserError for an output that is unknown, or needs an autoencoder that is not there."""
    if output not in get_args(Output):
        known = ", ".join(get_args(Output))
        raise UserError(f"output is {output!r}; it must be one of {known}")
    if output != "latents" and autoencoder is None:
        raise UserError('this pipeline has no autoencoder; ask for output="latents"')


def decode(
    autoencoder: Autoencoder, latents: Float[Array, "b h w c"], tiling: Tiling | None
) -> Float[np.ndarray, "b H W 3"]:
    """Pictures in [0, 1], float32; pictures large enough for `tiling` are decoded in tiles.

    Raises UserError if the tiles' size is not a multiple of the autoencoder's downscale.
    """
    graph, state = nnx.split(autoencoder)
    downscale = autoencoder.config.downscale
    height, width = (side * downscale for side in latents.shape[1:3])
    # Pixels are decoded independently, so that tiles would save nothing.
    if tiling is None or isinstance(autoencoder, Pixels) or not tiling.is_for(height, width):
        return on_host(_decode(graph, state, latents))
    return decode_in_tiles(
        lambda tile: on_host(_decode(graph, state, tile)), latents, tiling, downscale
    )


def to_pil(images: Float[np.ndarray, "b H W 3"]) -> list[Image.Image]:
    """Converts pictures in [0, 1] to 8-bit RGB."""
    return [Image.fromarray(image) for image in eight_bit(images)]


def eight_bit(images: Float[np.ndarray, "b H W 3"]) -> UInt8[np.ndarray, "b H W 3"]:
    """Rounds pictures in [0, 1] to 0..255."""
    return np.round(images * 255).astype(np.uint8)


def decoded(autoencoder: Autoencoder, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
    """Pictures in [0, 1], float32; devices share them where their number divides evenly."""
    images = autoencoder.decode(constrain_samples(latents)).astype(jnp.float32)
    return jnp.clip((images + 1) / 2, 0, 1)


@jax.jit(static_argnames=("graph",))
def _decode(
    graph: nnx.GraphDef, state: nnx.State, latents: Float[Array, "b h w c"]
) -> Float[Array, "b H W 3"]:
    return decoded(nnx.merge(graph, state), latents)
