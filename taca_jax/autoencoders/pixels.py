"""The autoencoder of pixel-space models, whose latents are normalised pictures."""

import math
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taca_jax.errors import UserError
from taca_jax.nn.kinds import ModelKind, register


@dataclass(frozen=True)
class PixelsConfig:
    """How pictures in [-1, 1] become latents: (x - shift_factor) * scaling_factor.

    The noise levels of training and sampling are meant for latents of mean 0 and deviation 1; with
    lower contrast, most of them would hide the picture completely.

    shift_factor: the mean of the data's pixels.
    scaling_factor: the inverse of their standard deviation.

    Raises UserError for factors that cannot be inverted.
    """

    latent_channels: ClassVar[int] = 3
    downscale: ClassVar[int] = 1

    shift_factor: float = 0.0
    scaling_factor: float = 1.0

    def __post_init__(self):
        shift, scale = self.shift_factor, self.scaling_factor
        if not math.isfinite(shift):
            raise UserError(f"pixels.shift_factor is {shift}; it must be finite")
        if not 0 < scale < math.inf:
            raise UserError(f"pixels.scaling_factor is {scale}; it must be positive and finite")


class Pixels(nnx.Module):
    """Normalises RGB pictures, NHWC; it has no parameters."""

    def __init__(
        self,
        config: PixelsConfig = PixelsConfig(),
        *,
        rngs: nnx.Rngs | None = None,
        dtype: DTypeLike | None = None,
    ):
        """`rngs` and `dtype` are accepted as for any model, and not used."""
        del rngs, dtype
        self.config = config

    def encode(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        """Latents of pictures in [-1, 1]."""
        return (images - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        """The inverse of `encode`."""
        return latents / self.config.scaling_factor + self.config.shift_factor


PIXELS_KIND = register(
    ModelKind(
        "pixels",
        "autoencoder",
        PixelsConfig,
        Pixels,
        sharding={},
    )
)
