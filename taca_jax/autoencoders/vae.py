"""The autoencoder of FLUX.1 and Stable Diffusion 3, whose latents are an eighth of the image size.

Source: Rombach et al. 2022 (arXiv:2112.10752), with 16 latent channels and without quantisation
convolutions; checked against diffusers' `AutoencoderKL`. Images and latents are NHWC.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from taca_jax.errors import UserError
from taca_jax.nn.kinds import ModelKind, register
from taca_jax.parallel.rules import WHOLE

NORM_EPSILON = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
ATTENTION_CHUNK = 1024
"""Queries at a time in the middle block: 64 MiB of float32 scores at 1024 px, instead of 1 GiB."""


@dataclass(frozen=True)
class VAEConfig:
    """Sizes, and the affine map between raw latents and those of the denoiser.

    `channels` are those of each resolution, from the image to the latents, each half the last.
    """

    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    groups: int
    scaling_factor: float
    shift_factor: float
    image_channels: int = 3

    @property
    def downscale(self) -> int:
        """Image pixels per latent position, along each axis."""
        return 2 ** (len(self.channels) - 1)


def check_images(images: Float[Array, "b h w c"], channels: int, multiple: int) -> None:
    """Raises UserError unless images are floats, NHWC, of `channels`, with sides divisible by
    `multiple`."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images are {images.dtype}; expected floats in [-1, 1]")
    if images.ndim != 4 or images.shape[-1] != channels:
        raise UserError(f"images have shape {images.shape}; expected [b, h, w, {channels}]")
    if images.shape[1] % multiple or images.shape[2] % multiple:
        raise UserError(
            f"images are {images.shape[1]} x {images.shape[2]}; height and width must be "
            f"multiples of {multiple}: resize or crop them"
        )


def check_latents(latents: Float[Array, "b h w c"], channels: int) -> None:
    """Raises UserError unless the latents are NHWC with `channels`."""
    if latents.ndim != 4 or latents.shape[-1] != channels:
        raise UserError(f"latents have shape {latents.shape}; expected [b, h, w, {channels}]")


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Doubles both sides by repeating pixels."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


@dataclass(frozen=True)
class _Make:
    """Creates the layers of one autoencoder, with its random keys and dtypes."""

    groups: int
    rngs: nnx.Rngs
    param_dtype: DTypeLike
    dtype: DTypeLike

    def conv(self, in_channels: int, channels: int, size: int = 3) -> nnx.Conv:
        return self._conv(in_channels, channels, size, 1, ((size // 2, size // 2),) * 2)

    def halving_conv(self, channels: int) -> nnx.Conv:
        """Stride 2, padded at the bottom and right only, as in the original."""
        return self._conv(channels, channels, 3, 2, ((0, 1), (0, 1)))

    def _conv(self, in_channels, channels, size, stride, padding) -> nnx.Conv:
        return nnx.Conv(
            in_channels,
            channels,
            (size, size),
            strides=stride,
            padding=padding,
            param_dtype=self.param_dtype,
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def linear(self, channels: int) -> nnx.Linear:
        return nnx.Linear(
            channels, channels, param_dtype=self.param_dtype, dtype=self.dtype, rngs=self.rngs
        )

    def norm(self, channels: int) -> nnx.GroupNorm:
        return nnx.GroupNorm(
            channels,
            self.groups,
            epsilon=NORM_EPSILON,
            use_fast_variance=False,
            param_dtype=self.param_dtype,
            dtype=jnp.float32,
            rngs=self.rngs,
        )


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 shortcut where channels change."""

    def __init__(self, make: _Make, in_channels: int, channels: int):
        self.norm1 = make.norm(in_channels)
        self.conv1 = make.conv(in_channels, channels)
        self.norm2 = make.norm(channels)
        self.conv2 = make.conv(channels, channels)
        self.shortcut = (
            make.conv(in_channels, channels, size=1) if in_channels != channels else nnx.data(None)
        )

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


def chunked_attention(
    q: Float[Array, "b s d"],
    k: Float[Array, "b s d"],
    v: Float[Array, "b s d"],
    chunk: int = ATTENTION_CHUNK,
) -> Float[Array, "b s d"]:
    """Single-head attention over `chunk` queries at a time, softmax in float32."""

    def attend(q):
        logits = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
        return jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v)

    b, s, d = q.shape
    if s <= chunk:
        return attend(q)
    num_chunks = -(-s // chunk)
    q = jnp.pad(q, ((0, 0), (0, num_chunks * chunk - s), (0, 0)))
    out = jax.lax.map(attend, q.reshape(b, num_chunks, chunk, d).swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(b, num_chunks * chunk, d)[:, :s]


class AttentionBlock(nnx.Module):
    """x + single-head self-attention over all positions."""

    def __init__(self, make: _Make, channels: int):
        self.norm = make.norm(channels)
        self.q = make.linear(channels)
        self.k = make.linear(channels)
        self.v = make.linear(channels)
        self.out = make.linear(channels)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.norm(x).reshape(b, h * w, c)
        y = chunked_attention(self.q(y), self.k(y), self.v(y))
        return x + self.out(y).reshape(b, h, w, c)


class MidBlock(nnx.Module):
    """The lowest resolution: resnet, attention, resnet."""

    def __init__(self, make: _Make, channels: int):
        self.resnets = nnx.List([ResnetBlock(make, channels, channels) for _ in range(2)])
        self.attention = AttentionBlock(make, channels)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attention(self.resnets[0](x)))


class DownBlock(nnx.Module):
    """Resnets at one resolution, then downsampling by 2, except in the last block."""

    def __init__(self, make: _Make, in_channels: int, channels: int, layers: int, last: bool):
        widths = (in_channels, *(channels,) * (layers - 1))
        self.resnets = nnx.List([ResnetBlock(make, width, channels) for width in widths])
        self.downsample = nnx.data(None) if last else make.halving_conv(channels)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsample is None else self.downsample(x)


class UpBlock(nnx.Module):
    """Resnets at one resolution, then upsampling by 2, except in the last block."""

    def __init__(self, make: _Make, in_channels: int, channels: int, layers: int, last: bool):
        widths = (in_channels, *(channels,) * (layers - 1))
        self.resnets = nnx.List([ResnetBlock(make, width, channels) for width in widths])
        self.upsample = nnx.data(None) if last else make.conv(channels, channels)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsample is None else self.upsample(upsample_nearest(x))


class Encoder(nnx.Module):
    """Images to mean and log variance, concatenated on the channel axis."""

    def __init__(self, make: _Make, config: VAEConfig):
        channels = config.channels
        self.conv_in = make.conv(config.image_channels, channels[0])
        self.down_blocks = nnx.List(
            [
                DownBlock(make, before, after, config.layers_per_block, i == len(channels) - 1)
                for i, (before, after) in enumerate(
                    zip((channels[0], *channels[:-1]), channels, strict=True)
                )
            ]
        )
        self.mid_block = MidBlock(make, channels[-1])
        self.norm_out = make.norm(channels[-1])
        self.conv_out = make.conv(channels[-1], 2 * config.latent_channels)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W z"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Raw latents to images. Has one more resnet per resolution than the encoder."""

    def __init__(self, make: _Make, config: VAEConfig):
        channels = config.channels[::-1]
        self.conv_in = make.conv(config.latent_channels, channels[0])
        self.mid_block = MidBlock(make, channels[0])
        self.up_blocks = nnx.List(
            [
                UpBlock(make, before, after, config.layers_per_block + 1, i == len(channels) - 1)
                for i, (before, after) in enumerate(
                    zip((channels[0], *channels[:-1]), channels, strict=True)
                )
            ]
        )
        self.norm_out = make.norm(channels[-1])
        self.conv_out = make.conv(channels[-1], config.image_channels)

    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Variational autoencoder; `encode` returns and `decode` takes the denoiser's latents.

    Those are (raw - shift_factor) * scaling_factor; only `moments` returns raw ones. Images are in
    [-1, 1]. Parameters are `param_dtype`, convolutions and projections compute in `dtype`; group
    norms, softmax and outputs are float32.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        make = _Make(config.groups, rngs, param_dtype, dtype)
        self.config = config
        self.encoder = Encoder(make, config)
        self.decoder = Decoder(make, config)

    def moments(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b H W z"], Float[Array, "b H W z"]]:
        """Mean and log variance of the raw latents.

        Raises UserError unless height and width are multiples of `config.downscale`.
        """
        check_images(images, self.config.image_channels, self.config.downscale)
        mean, logvar = jnp.split(self.encoder(images).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def encode(
        self, images: Float[Array, "b h w c"], rng: PRNGKeyArray | None = None
    ) -> Float[Array, "b H W z"]:
        """Latents for the denoiser: the mean, or a sample if `rng` is given."""
        return to_latents(self.config, *self.moments(images), rng)

    def decode(self, latents: Float[Array, "b H W z"]) -> Float[Array, "b h w c"]:
        """Images of the denoiser's latents, about [-1, 1], not clipped."""
        check_latents(latents, self.config.latent_channels)
        raw = latents.astype(jnp.float32) / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(raw).astype(jnp.float32)


def to_latents(
    config: VAEConfig,
    mean: Float[Array, "b H W z"],
    logvar: Float[Array, "b H W z"] | None,
    rng: PRNGKeyArray | None = None,
) -> Float[Array, "b H W z"]:
    """Latents for the denoiser from `AutoencoderKL.moments`: the mean, or a sample if `rng` and the
    log variance are given."""
    if rng is not None and logvar is not None:
        mean = mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape)
    return (mean - config.shift_factor) * config.scaling_factor


VAE_KIND = register(
    ModelKind(
        "vae",
        "autoencoder",
        VAEConfig,
        AutoencoderKL,
        # Replicated: it is small compared to a transformer, and convolutions are hard to shard.
        sharding={r".*": (WHOLE, WHOLE)},
    )
)
