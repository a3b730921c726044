"""FLUX.2's autoencoder, whose latents are patches of an autoencoder's, normalised by channel.

Source: black-forest-labs/flux2, autoencoder.py; checked against diffusers' `AutoencoderKLFlux2`.
Images and latents are NHWC.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taca_jax.autoencoders.vae import (
    LOGVAR_RANGE,
    AutoencoderKL,
    VAEConfig,
    check_images,
    check_latents,
)
from taca_jax.errors import UserError
from taca_jax.nn.kinds import ModelKind, register
from taca_jax.nn.layers import Fixed, patchify, unpatchify
from taca_jax.parallel.rules import WHOLE

EPSILON = 1e-4
"""Added to the variances of the latents."""


@dataclass(frozen=True, kw_only=True)
class PatchedVAEConfig(VAEConfig):
    """Sizes of the autoencoder, and of the patches of its latents.

    latent_channels: of the denoiser's latents, which are patches of patch_size x patch_size of the
    inner autoencoder's. scaling_factor, shift_factor: none, since statistics of each channel scale
    and shift the latents.

    Raises UserError for channels that are no multiple of a patch's positions, and for factors.
    """

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    patch_size: int = 2

    def __post_init__(self):
        if self.patch_size < 1 or self.latent_channels % self.patch_size**2:
            raise UserError(
                f"latents have {self.latent_channels} channels; expected a multiple of "
                f"{self.patch_size} x {self.patch_size}, the positions of a patch"
            )
        if (self.scaling_factor, self.shift_factor) != (1.0, 0.0):
            raise UserError(
                f"scaling_factor is {self.scaling_factor} and shift_factor {self.shift_factor}; "
                "expected 1 and 0 where latents are normalised by channel"
            )

    @property
    def downscale(self) -> int:
        """Image pixels per position of the denoiser's latents, along each axis."""
        return super().downscale * self.patch_size

    @property
    def inner(self) -> VAEConfig:
        """The autoencoder whose latents are put into patches."""
        return VAEConfig(
            channels=self.channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels // self.patch_size**2,
            groups=self.groups,
            scaling_factor=1.0,
            shift_factor=0.0,
            image_channels=self.image_channels,
        )


class LatentNorm(nnx.Module):
    """The statistics of each channel of the latents over the training data; never trained."""

    def __init__(self, channels: int, *, param_dtype: DTypeLike):
        self.mean = Fixed(jnp.zeros(channels, param_dtype))
        self.variance = Fixed(jnp.ones(channels, param_dtype))

    @property
    def _mean(self) -> Float[Array, " z"]:
        return self.mean[...].astype(jnp.float32)

    @property
    def _variance(self) -> Float[Array, " z"]:
        return self.variance[...].astype(jnp.float32) + EPSILON

    def normalised(
        self, mean: Float[Array, "b h w z"], logvar: Float[Array, "b h w z"]
    ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """A distribution's mean and log variance, after normalisation."""
        deviation = jnp.sqrt(self._variance)
        return (mean - self._mean) / deviation, logvar - jnp.log(self._variance)

    def restored(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The inverse for latents."""
        return latents * jnp.sqrt(self._variance) + self._mean


class PatchedVAE(AutoencoderKL):
    """An autoencoder whose latents are the normalised patches of another's, as `moments` returns
    them; what they hold is (channel, row, column).

    Images are in [-1, 1]. Dtypes are as in AutoencoderKL; the statistics are applied in float32.
    """

    config: PatchedVAEConfig

    def __init__(
        self,
        config: PatchedVAEConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(config.inner, rngs=rngs, param_dtype=param_dtype, dtype=dtype)
        self.config = config
        raw = config.inner.latent_channels
        self.quant_conv, self.post_quant_conv = (  # convolutions of 1 x 1
            nnx.Linear(width, width, param_dtype=param_dtype, dtype=dtype, rngs=rngs)
            for width in (2 * raw, raw)
        )
        self.latent_norm = LatentNorm(config.latent_channels, param_dtype=param_dtype)

    def raw_moments(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b H W z"], Float[Array, "b H W z"]]:
        """Mean and log variance of the inner autoencoder's latents. Raises as `moments` does."""
        check_images(images, self.config.image_channels, self.config.downscale)
        found = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        mean, logvar = jnp.split(found, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def moments(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b H W z"], Float[Array, "b H W z"]]:
        """Mean and log variance of the denoiser's latents.

        Raises UserError unless height and width are multiples of `config.downscale`.
        """
        mean, logvar = (self._patches(each) for each in self.raw_moments(images))
        return self.latent_norm.normalised(mean, logvar)

    def decode(self, latents: Float[Array, "b H W z"]) -> Float[Array, "b h w c"]:
        """Images of the denoiser's latents, about [-1, 1], not clipped."""
        check_latents(latents, self.config.latent_channels)
        patch = self.config.patch_size
        b, rows, columns, channels = latents.shape
        patches = self.latent_norm.restored(latents.astype(jnp.float32))
        tokens = patches.reshape(b, rows * columns, channels)
        raw = unpatchify(tokens, patch, rows * patch, columns * patch)
        return self.decoder(self.post_quant_conv(raw)).astype(jnp.float32)

    def _patches(self, raw: Float[Array, "b H W z"]) -> Float[Array, "b h w k"]:
        b, height, width, _ = raw.shape
        patch = self.config.patch_size
        return patchify(raw, patch).reshape(b, height // patch, width // patch, -1)


PATCHED_VAE_KIND = register(
    ModelKind(
        "patched_vae",
        "autoencoder",
        PatchedVAEConfig,
        PatchedVAE,
        # Replicated, as the autoencoder without patches.
        sharding={r".*": (WHOLE, WHOLE)},
    )
)
