"""The autoencoder of models that work on pictures themselves."""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float


@dataclass(frozen=True)
class PixelsConfig:
    latent_channels: int = 3
    downscale: int = 1


class Pixels(nnx.Module):
    """Latents are the pictures: RGB, NHWC, in [-1, 1]."""

    def __init__(self):
        self.config = PixelsConfig()

    def encode(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        return images

    def decode(self, latents: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        return latents
