"""The small parts that the MM-DiTs share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.nn.low_bit import low_bit_matmul

TIMESTEP_CHANNELS = 256
"""Sinusoidal channels of a time or guidance embedding, in FLUX and SD3 alike."""


class LoRAParam(nnx.Param):
    """A low-rank factor: what LoRA training differentiates and saves, and nothing else is."""


class Fixed(nnx.Variable):
    """What is stored and placed as a parameter is and never trained: a table of positions."""


class Quantized(Fixed):
    """The codes of a quantised kernel, or their scales; their dtypes are their own."""


XAVIER = nnx.initializers.xavier_uniform()
ZEROS = nnx.initializers.zeros


@jax.custom_vjp
def matmul(x: Float[Array, "*s i"], kernel: Float[Array, "i o"]) -> Float[Array, "*s o"]:
    """x @ kernel, with a weight gradient that XLA's CPU backend runs at full speed."""
    return x @ kernel


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return x @ kernel, (x, kernel)


def _matmul_backward(saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved

    # Contracting over several leading axes makes the CPU backend copy and transpose dy, which
    # takes longer than the product. Elsewhere the axes stay apart: they may be sharded apart.
    def flat(x: jax.Array, dy: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])

    def apart(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.einsum("...i,...o->io", x, dy)

    d_kernel = jax.lax.platform_dependent(x, dy, cpu=flat, default=apart)
    return dy @ kernel.T, d_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """y = x @ kernel + bias, plus lora_scale * (x @ lora_a) @ lora_b where factors are attached.

    kernel `[in, out]`, bias `[out]` or None, lora_a `[in, r]`, lora_b `[r, out]`, whose strength
    alpha / r is `lora_alpha_over_rank`; parameters in `param_dtype`, computation in `dtype`. A
    stack of layers carries a leading layer axis on each. The kernel starts as `kernel_init` says
    (adaptive-norm layers and output heads at zero), the bias at zero.

    Of a quantised kernel (`quantize.py`), `kernel` holds the codes and `kernel_scale` their scales.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
        dtype: jnp.dtype,
        bias: bool = True,
        kernel_init: nnx.Initializer = XAVIER,
    ):
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        self.kernel: nnx.Variable[jax.Array] = nnx.Param(kernel)
        self.kernel_scale: Quantized | None = nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if bias else nnx.data(None)
        self.lora_a: LoRAParam | None = nnx.data(None)
        self.lora_b: LoRAParam | None = nnx.data(None)
        self.lora_alpha_over_rank = 1.0
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "b *s i"], lora_scale: Float[Array, " b"] | None = None
    ) -> Float[Array, "b *s o"]:
        x = x.astype(self.dtype)
        if self.kernel_scale is None:
            y = matmul(x, self.kernel[...].astype(self.dtype))
        else:
            y = low_bit_matmul(x, self.kernel[...], self.kernel_scale[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None and lora_scale is not None:
            down = matmul(x, self.lora_a[...].astype(self.dtype))
            gate = lora_scale.reshape(-1, *(1,) * (x.ndim - 1)) * self.lora_alpha_over_rank
            y = y + matmul(down * gate.astype(self.dtype), self.lora_b[...].astype(self.dtype))
        return y


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, epsilon: float):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (features,), param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


SUBLANES = 8
"""Rows of a TPU's registers, which have 128 lanes."""


def to_tiles(x: Float[Array, "b s h d"]) -> Float[Array, "b n h r d"]:
    """Heads as stacks of SUBLANES tokens' channels, the last stack filled up with zeros.

    That is how a TPU holds the [b, s, h * d] that projections leave and attention takes: what is
    done per head in this form needs no copy on the way, which would cost more than attention does.
    """
    b, s, h, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -s % SUBLANES), (0, 0), (0, 0)))
    return x.reshape(b, -1, SUBLANES, h, d).swapaxes(2, 3)


def from_tiles(x: Float[Array, "b n h r d"], length: int) -> Float[Array, "b s h d"]:
    """The inverse of `to_tiles` for `length` tokens."""
    b, _, h, _, d = x.shape
    return x.swapaxes(2, 3).reshape(b, -1, h, d)[:, :length]


def layer_norm(x: Float[Array, "*b d"], epsilon: float = 1e-6) -> Float[Array, "*b d"]:
    """LayerNorm without parameters, in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + epsilon)
    return y.astype(x.dtype)


def modulate(
    x: Float[Array, "b s d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b s d"]:
    """The adaptive norm of DiT: layer_norm(x) * (1 + scale) + shift."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def timestep_embedding(value: Float[Array, " b"]) -> Float[Array, "b c"]:
    """Sinusoids of a value in 0..1000: cosines, then sines, wavelengths 2 pi to 2 pi x 10000.

    Always float32: in bfloat16 the phase near 1000 would be off by radians, where TACA works.
    """
    half = TIMESTEP_CHANNELS // 2
    # As the originals round it: exponents in float32, their exponential to the nearest float32. A
    # guidance of 3.5 is 3500 here, and each last bit of a frequency is 3500 times that in phase.
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = value.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class MLPEmbedder(nnx.Module):
    """Linear, SiLU, Linear: how times, guidance and pooled text enter the modulation vector."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
        dtype: jnp.dtype,
    ):
        types = {"rngs": rngs, "param_dtype": param_dtype, "dtype": dtype}
        self.linear_1 = Linear(in_features, features, **types)
        self.linear_2 = Linear(features, features, **types)

    def __call__(
        self, x: Float[Array, "b i"], lora_scale: Float[Array, " b"] | None = None
    ) -> Float[Array, "b d"]:
        return self.linear_2(nnx.silu(self.linear_1(x, lora_scale)), lora_scale)


def patchify(latents: Float[Array, "b H W c"], patch: int) -> Float[Array, "b s k"]:
    """Square patches as tokens, row by row; a token holds (channel, row, column), as FLUX packs."""
    b, height, width, c = latents.shape
    if height % patch or width % patch:
        raise ValueError(f"latents are {height} x {width}; both must be multiples of {patch}")
    x = latents.reshape(b, height // patch, patch, width // patch, patch, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, c * patch * patch)


def unpatchify(
    tokens: Float[Array, "b s k"], patch: int, height: int, width: int
) -> Float[Array, "b H W c"]:
    """The inverse of `patchify` for latents of `height` x `width`."""
    b, _, features = tokens.shape
    x = tokens.reshape(b, height // patch, width // patch, -1, patch, patch)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, height, width, features // patch**2)
