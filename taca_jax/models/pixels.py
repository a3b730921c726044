"""The autoencoder of models that work on pictures themselves."""

import math
from dataclasses import dataclass

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taca_jax.errors import UserError


@dataclass(frozen=True)
class PixelsConfig:
    """How pictures in [-1, 1] become latents: (x - shift_factor) * scaling_factor.

    The data's mean and the inverse of its standard deviation make latents of mean 0 and deviation
    1, which is what timesteps drawn evenly and the sampler's schedule are made for: of pictures with
    less contrast than the noise, most timesteps would show nothing.
    """

    shift_factor: float = 0.0
    scaling_factor: float = 1.0
    latent_channels: int = 3

    def __post_init__(self):
        scale, shift = self.scaling_factor, self.shift_factor
        if not (0 < scale < math.inf and math.isfinite(shift)):
            raise UserError(
                f"pixels.shift_factor is {shift} and pixels.scaling_factor {scale}; they must be "
                "finite, and the scale positive"
            )

    @property
    def downscale(self) -> int:
        return 1


class Pixels(nnx.Module):
    """Latents are the pictures, normalised: RGB, NHWC. It has no parameters."""

    def __init__(
        self,
        config: PixelsConfig = PixelsConfig(),
        *,
        rngs: nnx.Rngs | None = None,
        dtype: DTypeLike | None = None,
    ):
        """`rngs` and `dtype` are what any model is made with; nothing here needs them."""
        del rngs, dtype
        self.config = config

    def encode(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        return (images - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        return latents / self.config.scaling_factor + self.config.shift_factor
