"""TAESD-style autoencoders: FLUX and SD3 latents at a fraction of the full autoencoder's cost.

Source: github.com/madebyollin/taesd (TAEF1 for FLUX.1, TAESD3 for Stable Diffusion 3); checked
against diffusers' `AutoencoderTiny` with the published weights. Images and latents are NHWC.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taca_jax.autoencoders.vae import check_images, check_latents, upsample_nearest
from taca_jax.nn.kinds import ModelKind, register
from taca_jax.nn.layers import LayerOptions
from taca_jax.parallel.rules import WHOLE

LATENT_LIMIT = 3.0
"""The decoder's input is limit * tanh(latents / limit)."""


@dataclass(frozen=True)
class TinyVAEConfig:
    """Sizes of encoder and decoder: `width` channels throughout, residual blocks per resolution.

    `encoder_blocks` and `decoder_blocks` run from input to output; between two of them the
    resolution is halved or doubled.
    """

    latent_channels: int
    image_channels: int
    width: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]

    @property
    def downscale(self) -> int:
        """Image pixels per latent position, along each axis."""
        return 2 ** (len(self.encoder_blocks) - 1)


TAEF1 = TAESD3 = TinyVAEConfig(
    latent_channels=16,
    image_channels=3,
    width=64,
    encoder_blocks=(1, 3, 3, 3),
    decoder_blocks=(3, 3, 3, 1),
)


def limit_latents(latents: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
    """Maps latents smoothly into the range that the decoder was trained on."""
    return jnp.tanh(latents / LATENT_LIMIT) * LATENT_LIMIT


class TinyBlock(nnx.Module):
    """relu(x + three convolutions of x)."""

    def __init__(self, width: int, **options: Unpack[LayerOptions]):
        first, second, third = (_conv(width, width, **options) for _ in range(3))
        self.conv = nnx.Sequential(first, nnx.relu, second, nnx.relu, third)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return nnx.relu(self.conv(x) + x)


def _conv(
    in_channels: int,
    channels: int,
    *,
    stride: int = 1,
    bias: bool = True,
    **options: Unpack[LayerOptions],
) -> nnx.Conv:
    return nnx.Conv(
        in_channels,
        channels,
        (3, 3),
        strides=stride,
        padding=1,  # on all sides; "SAME" would pad strided convolutions on two sides only
        use_bias=bias,
        kernel_init=nnx.initializers.he_normal(),
        **options,
    )


class TinyVAE(nnx.Module):
    """Deterministic autoencoder on images in [-1, 1] and the denoiser's own latents.

    TAEF1 and TAESD3 were trained on the *scaled and shifted* latents that FLUX and SD3 denoise, so
    `decode` takes the same latents as `AutoencoderKL.decode` (diffusers' configs say scaling 1,
    shift 0). Parameters are `param_dtype`, convolutions compute in `dtype`, outputs are float32.
    """

    def __init__(
        self,
        config: TinyVAEConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        options: LayerOptions = {"rngs": rngs, "param_dtype": param_dtype, "dtype": dtype}
        width = config.width
        # Layers have the same positions as in the published files, whose keys also count layers
        # without parameters.
        encoder: list[Callable] = [_conv(config.image_channels, width, **options)]
        for i, num_blocks in enumerate(config.encoder_blocks):
            if i > 0:
                encoder.append(_conv(width, width, stride=2, bias=False, **options))
            encoder.extend(TinyBlock(width, **options) for _ in range(num_blocks))
        encoder.append(_conv(width, config.latent_channels, **options))

        decoder: list[Callable] = [
            limit_latents,
            _conv(config.latent_channels, width, **options),
            nnx.relu,
        ]
        for i, num_blocks in enumerate(config.decoder_blocks):
            if i > 0:
                decoder += [upsample_nearest, _conv(width, width, bias=False, **options)]
            decoder.extend(TinyBlock(width, **options) for _ in range(num_blocks))
        decoder.append(_conv(width, config.image_channels, **options))

        self.config = config
        self.encoder = nnx.Sequential(*encoder)
        self.decoder = nnx.Sequential(*decoder)

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b H W z"]:
        """Latents for the denoiser. Raises UserError for sizes that are not multiples of 8."""
        check_images(images, self.config.image_channels, self.config.downscale)
        return self.encoder((images + 1) / 2).astype(jnp.float32)

    def decode(self, latents: Float[Array, "b H W z"]) -> Float[Array, "b h w c"]:
        """Images of the denoiser's latents, about [-1, 1], not clipped."""
        check_latents(latents, self.config.latent_channels)
        return self.decoder(latents).astype(jnp.float32) * 2 - 1


TINY_VAE_KIND = register(
    ModelKind(
        "tiny_vae",
        "autoencoder",
        TinyVAEConfig,
        TinyVAE,
        # Replicated: it is small compared to a transformer, and convolutions are hard to shard.
        sharding={r".*": (WHOLE, WHOLE)},
    )
)
