"""TAESD-style autoencoders: FLUX and SD3 latents at a small part of the full autoencoder's cost.

Source: github.com/madebyollin/taesd (TAEF1 for FLUX.1, TAESD3 for Stable Diffusion 3); checked
against diffusers' `AutoencoderTiny` with the published weights. Images and latents are NHWC.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from taca_jax.errors import UserError
from taca_jax.models.vae import check_images, check_latents, upsample_nearest

LATENT_LIMIT = 3.0
"""The decoder sees limit * tanh(latents / limit)."""


@dataclass(frozen=True)
class TinyVAEConfig:
    """Sizes of both nets: `width` channels throughout, residual blocks per resolution.

    `encoder_blocks` and `decoder_blocks` run from a net's input to its output; each step between
    two of them halves or doubles the resolution.
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
    """Bends latents smoothly into the range that the decoder was trained on."""
    return jnp.tanh(latents / LATENT_LIMIT) * LATENT_LIMIT


class TinyBlock(nnx.Module):
    """relu(x + three convolutions of x)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike, dtype: DTypeLike):
        def conv() -> nnx.Conv:
            return _conv(width, width, rngs=rngs, param_dtype=param_dtype, dtype=dtype)

        self.conv = nnx.Sequential(conv(), nnx.relu, conv(), nnx.relu, conv())

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return nnx.relu(self.conv(x) + x)


def _conv(
    in_channels: int,
    channels: int,
    *,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    dtype: DTypeLike,
    stride: int = 1,
    bias: bool = True,
) -> nnx.Conv:
    return nnx.Conv(
        in_channels,
        channels,
        (3, 3),
        strides=stride,
        padding=1,  # on all sides; "SAME" would pad strided convolutions on two only
        use_bias=bias,
        kernel_init=nnx.initializers.he_normal(),
        param_dtype=param_dtype,
        dtype=dtype,
        rngs=rngs,
    )


class TinyVAE(nnx.Module):
    """Deterministic autoencoder on images in [-1, 1] and the denoiser's own latents.

    TAEF1 and TAESD3 were trained on the *scaled and shifted* latents that FLUX and SD3 denoise, so
    nothing is to be scaled around them: the same latents go into `decode` here and into
    `AutoencoderKL.decode` (diffusers' configs say scaling 1, shift 0). Parameters are
    `param_dtype`, convolutions compute in `dtype`, what is returned is float32.
    """

    def __init__(
        self,
        config: TinyVAEConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        types = {"rngs": rngs, "param_dtype": param_dtype, "dtype": dtype}
        width = config.width
        # Layers stand where they stand in the published files, whose keys count those without
        # parameters too.
        encoder: list[Callable] = [_conv(config.image_channels, width, **types)]
        for i, num_blocks in enumerate(config.encoder_blocks):
            if i > 0:
                encoder.append(_conv(width, width, stride=2, bias=False, **types))
            encoder.extend(TinyBlock(width, **types) for _ in range(num_blocks))
        encoder.append(_conv(width, config.latent_channels, **types))

        decoder: list[Callable] = [
            limit_latents,
            _conv(config.latent_channels, width, **types),
            nnx.relu,
        ]
        for i, num_blocks in enumerate(config.decoder_blocks):
            if i > 0:
                decoder += [upsample_nearest, _conv(width, width, bias=False, **types)]
            decoder.extend(TinyBlock(width, **types) for _ in range(num_blocks))
        decoder.append(_conv(width, config.image_channels, **types))

        self.config = config
        self.encoder = nnx.Sequential(*encoder)
        self.decoder = nnx.Sequential(*decoder)

    @classmethod
    def from_arrays(
        cls,
        config: TinyVAEConfig,
        encoder: Mapping[str, np.ndarray],
        decoder: Mapping[str, np.ndarray],
        *,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ) -> "TinyVAE":
        """Built from the arrays of a published encoder and decoder ("3.conv.0.weight", OIHW).

        Raises UserError that names every key that is missing, left over or of another shape.
        """
        abstract = nnx.eval_shape(
            lambda: cls(config, rngs=nnx.Rngs(0), param_dtype=param_dtype, dtype=dtype)
        )
        definition, state = nnx.split(abstract)
        given = {
            f"{net}/{key}": array
            for net, arrays in (("encoder", encoder), ("decoder", decoder))
            for key, array in arrays.items()
        }
        wanted = {_published_key(path): param for path, param in nnx.to_flat_state(state)}
        problems = [f"{key} is missing" for key in wanted if key not in given]
        problems += [f"{key} is left over" for key in given if key not in wanted]
        for key in wanted.keys() & given.keys():
            array, param = given[key], wanted[key]
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
            if array.shape == param.shape:
                param.set_value(jnp.asarray(array, param_dtype))
            else:
                problems.append(f"{key} is {array.shape} instead of {param.shape} (HWIO)")
        if problems:
            raise UserError(
                f"these are not the weights of this tiny autoencoder ({config}): "
                f"{'; '.join(sorted(problems))}"
            )
        return nnx.merge(definition, state)

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b H W z"]:
        """Latents for the denoiser. Raises UserError for sizes that are no multiple of 8."""
        check_images(images, self.config.image_channels, self.config.downscale)
        return self.encoder((images + 1) / 2).astype(jnp.float32)

    def decode(self, latents: Float[Array, "b H W z"]) -> Float[Array, "b h w c"]:
        """Images of the denoiser's latents, about [-1, 1] and not clipped to it."""
        check_latents(latents, self.config.latent_channels)
        return self.decoder(latents).astype(jnp.float32) * 2 - 1


def _published_key(path: Iterable[object]) -> str:
    """("encoder", "layers", 3, "conv", "layers", 0, "kernel") -> "encoder/3.conv.0.weight"."""
    net, *rest = [str(part) for part in path if part != "layers"]
    return f"{net}/{'.'.join(rest)}".replace("kernel", "weight")


def load_taesd(
    encoder_path: Path,
    decoder_path: Path,
    config: TinyVAEConfig = TAEF1,
    *,
    param_dtype: DTypeLike = jnp.float32,
    dtype: DTypeLike = jnp.float32,
) -> TinyVAE:
    """TinyVAE of the published files (taef1_encoder.safetensors, taef1_decoder.safetensors, ...).

    Raises UserError where a file is absent, damaged or of another model.
    """
    arrays = []
    for path in (encoder_path, decoder_path):
        try:
            arrays.append(load_file(path))
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is not there; TAEF1 and TAESD3 are at huggingface.co/madebyollin"
            ) from error
        except SafetensorError as error:
            raise UserError(
                f"{path} is no complete safetensors file ({error}); download it again"
            ) from error
    return TinyVAE.from_arrays(config, *arrays, param_dtype=param_dtype, dtype=dtype)
