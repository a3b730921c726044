"""Latents to pictures: at once or in squares, as arrays or PIL's."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image

from taca_jax.autoencoders.pixels import Pixels
from taca_jax.autoencoders.tiling import Tiling, decode_in_tiles
from taca_jax.autoencoders.tiny_vae import TinyVAE
from taca_jax.autoencoders.vae import AutoencoderKL
from taca_jax.parallel.processes import on_host

Autoencoder = Pixels | TinyVAE | AutoencoderKL


def decode(
    autoencoder: Autoencoder, latents: Float[Array, "b h w c"], tiling: Tiling | None
) -> Float[np.ndarray, "b H W 3"]:
    """Pictures in [0, 1], float32; `tiling` says which sizes are decoded in squares, None none.

    Raises UserError where the squares are no multiple of what the autoencoder takes.
    """
    graph, state = nnx.split(autoencoder)
    downscale = autoencoder.config.downscale
    height, width = (side * downscale for side in latents.shape[1:3])
    # Pixels are decoded one by one: squares would be for nothing.
    if tiling is None or isinstance(autoencoder, Pixels) or not tiling.is_for(height, width):
        return on_host(_decode(graph, state, latents))
    return decode_in_tiles(
        lambda square: on_host(_decode(graph, state, square)), latents, tiling, downscale
    )


def to_pil(images: Float[np.ndarray, "b H W 3"]) -> list[Image.Image]:
    """Pictures in [0, 1] as 8-bit RGB."""
    return [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in images]


@jax.jit(static_argnames=("graph",))
def _decode(
    graph: nnx.GraphDef, state: nnx.State, latents: Float[Array, "b h w c"]
) -> Float[Array, "b H W 3"]:
    images = nnx.merge(graph, state).decode(latents).astype(jnp.float32)
    return jnp.clip((images + 1) / 2, 0, 1)
