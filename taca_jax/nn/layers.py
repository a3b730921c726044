"""Layers that the MM-DiTs share."""

import functools
import math
from collections.abc import Sequence
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taca_jax.attention.keeping import keepable
from taca_jax.nn.fusion import gradient_written_once, written_once
from taca_jax.nn.low_bit import low_bit_matmul
from taca_jax.nn.stacking import LORA_PRODUCTS

TIMESTEP_CHANNELS = 256
"""Sinusoidal channels of a time or guidance embedding, in FLUX and SD3 alike."""


class LoRAParam(nnx.Param):
    """A low-rank factor. LoRA training differentiates and saves these and nothing else."""


class Fixed(nnx.Variable):
    """An array that is stored and sharded like a parameter but never trained."""


class Quantized(Fixed):
    """The codes of a quantised kernel, or their scales; casts of the parameters skip them."""


LoRAScale = Float[Array, "b *n"]
"""The strength of attached LoRA factors in each sample: `[b]` of all LoRAs alike, or `[b, n]` of
each of n LoRAs, in the order in which they were attached."""


class LayerOptions(TypedDict):
    """How layers are created: random keys, and the dtypes of parameters and of computation."""

    rngs: nnx.Rngs
    param_dtype: DTypeLike
    dtype: DTypeLike


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

    # Contracting over several leading axes makes the CPU backend copy and transpose dy, which takes
    # longer than the product. Other backends keep the axes, which may be sharded differently.
    def flat(x: jax.Array, dy: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])

    def unflattened(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.einsum("...i,...o->io", x, dy)

    d_kernel = jax.lax.platform_dependent(x, dy, cpu=flat, default=unflattened)
    return dy @ kernel.T, d_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _matmul_parts(parts: list[jax.Array], kernel: Float[Array, "i o"]) -> Float[Array, "*s o"]:
    """x @ kernel, where the channels of the parts side by side are x."""
    ends = np.cumsum([part.shape[-1] for part in parts[:-1]])
    rows = jnp.split(kernel, ends) if len(parts) > 1 else [kernel]
    products = [matmul(part, own) for part, own in zip(parts, rows, strict=True)]
    return functools.reduce(jnp.add, products)


def _columns(parameter: nnx.Variable[jax.Array], ends: tuple[int, ...]) -> list[jax.Array]:
    """The parameter, its last axis split at `ends`."""
    return jnp.split(parameter[...], ends, axis=-1) if ends else [parameter[...]]


class Linear(nnx.Module):
    """y = x @ kernel + bias, plus lora_scale * (x @ lora_a) @ lora_b where factors are attached.

    kernel `[in, out]`, bias `[out]` or None, lora_a `[in, r]`, lora_b `[r, out]`, scaled by
    `lora_alpha_over_rank` = alpha / r; parameters in `param_dtype`, computation in `dtype`. In a
    stack of layers each has a leading layer axis. `kernel_init` initialises the kernel
    (adaptive-norm layers and output heads use zeros); the bias starts at zero.

    The factors of several LoRAs stand side by side along r; `lora_ranks` says how much of r is of
    each of them, 0 of one that does not adapt this layer.

    When the kernel is quantised (`nn.quantization`), `kernel` holds codes, `kernel_scale` scales.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        kernel_init: nnx.Initializer = XAVIER,
        **options: Unpack[LayerOptions],
    ):
        param_dtype = options["param_dtype"]
        kernel = kernel_init(options["rngs"].params(), (in_features, out_features), param_dtype)
        self.kernel: nnx.Variable[jax.Array] = nnx.Param(kernel)
        self.kernel_scale: Quantized | None = nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if bias else nnx.data(None)
        self.lora_a: LoRAParam | None = nnx.data(None)
        self.lora_b: LoRAParam | None = nnx.data(None)
        self.lora_alpha_over_rank = 1.0
        self.lora_ranks: tuple[int, ...] = ()
        self.dtype = options["dtype"]

    def __call__(
        self,
        x: Float[Array, "b *s i"] | tuple[Float[Array, "b *s _"], ...],
        lora_scale: LoRAScale | None = None,
    ) -> Float[Array, "b *s o"]:
        """y of x, or of arrays whose channels, side by side, are x: each has its own rows of the
        kernel, so that none is copied."""
        (y,) = self.in_parts(x, lora_scale)
        return y

    def in_parts(
        self,
        x: Float[Array, "b *s i"] | tuple[Float[Array, "b *s _"], ...],
        lora_scale: LoRAScale | None = None,
        *,
        ends: tuple[int, ...] = (),
        inner: Float[Array, "b *s r"] | None = None,
    ) -> list[Float[Array, "b *s _"]]:
        """The channels of y split at `ends`. Each part is a product with its own columns of the
        kernel, so that the backward pass can keep one and compute another again.

        inner: x @ lora_a, where it is there already.
        """
        inputs = [part.astype(self.dtype) for part in (x if isinstance(x, tuple) else (x,))]
        kernels = _columns(self.kernel, ends)
        # What x is made of is left to the narrow products of a LoRA below, whose backward pass then
        # makes x again on its way in.
        written = [written_once(part) for part in inputs]
        if self.kernel_scale is None:
            made = [_matmul_parts(written, kernel.astype(self.dtype)) for kernel in kernels]
        else:
            # Blocks of inputs that share a scale may lie across the inputs.
            whole = written[0] if len(written) == 1 else jnp.concatenate(written, axis=-1)
            scales = _columns(self.kernel_scale, ends)
            made = [low_bit_matmul(whole, *each) for each in zip(kernels, scales, strict=True)]
        if self.bias is not None:
            biases = _columns(self.bias, ends)
            made = [y + bias.astype(self.dtype) for y, bias in zip(made, biases, strict=True)]
        if self.lora_a is not None and self.lora_b is not None and lora_scale is not None:
            if inner is None:
                inner = _matmul_parts(inputs, self.lora_a[...].astype(self.dtype))
            inner = keepable(inner, LORA_PRODUCTS)
            gate = self._by_rank(lora_scale) * self.lora_alpha_over_rank
            gate = gate.reshape(len(gate), *(1,) * (inner.ndim - 2), -1).astype(self.dtype)
            ups = [factor.astype(self.dtype) for factor in _columns(self.lora_b, ends)]
            made = [y + matmul(inner * gate, up) for y, up in zip(made, ups, strict=True)]
        return made

    def _by_rank(self, lora_scale: LoRAScale) -> Float[Array, "b r"]:
        """The strength of each of r, or one for all of r if it is that of all LoRAs alike.

        Raises ValueError for strengths of another number of LoRAs than are attached.
        """
        if lora_scale.ndim == 1:
            return lora_scale[:, None]
        given, attached = lora_scale.shape[1], len(self.lora_ranks)
        if given != attached:
            raise ValueError(f"lora_scale has strengths of {given} LoRAs; {attached} are attached")
        return lora_scale[:, np.repeat(np.arange(attached), self.lora_ranks)]


def of_one_input(
    layers: Sequence[Linear], x: Float[Array, "b *s i"], lora_scale: LoRAScale | None = None
) -> list[Float[Array, "b *s _"]]:
    """y of x of each of some layers, of one dtype, which read x once for all of their LoRAs."""
    x = x.astype(layers[0].dtype)
    factors = [None if each.lora_a is None else each.lora_a[...] for each in layers]
    present = [a.astype(x.dtype) for a in factors if a is not None]
    if lora_scale is None or len(present) < 2:
        return [layer(x, lora_scale) for layer in layers]
    ends = np.cumsum([a.shape[-1] for a in present[:-1]])
    inner = iter(jnp.split(matmul(x, jnp.concatenate(present, axis=-1)), ends, axis=-1))
    return [
        layer.in_parts(x, lora_scale, inner=None if a is None else next(inner))[0]
        for layer, a in zip(layers, factors, strict=True)
    ]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike, epsilon: float):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (features,), param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


SUBLANES = 8
"""Rows of a TPU vector register; each row has 128 lanes."""


def to_tiles(x: Float[Array, "b s h d"]) -> Float[Array, "b n h r d"]:
    """Groups SUBLANES tokens of each head, `r` = SUBLANES; the last group is padded with zeros.

    This matches a TPU's layout of the [b, s, h * d] arrays that projections produce and attention
    reads. Per-head operations in this form need no relayout, which would cost more than attention.
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
    y = layer_norm(x) * (1 + scale[:, None]) + shift[:, None]
    return written_once(gradient_written_once(y))


def gated(
    x: Float[Array, "b s d"], gate: Float[Array, "b d"], y: Float[Array, "b s d"]
) -> Float[Array, "b s d"]:
    """The residual sum of DiT: x + gate * y, where y is a product."""
    return x + gate[:, None] * gradient_written_once(y)


def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """GELU between an MLP's two products, by tanh as the originals have it."""
    return nnx.gelu(gradient_written_once(x), approximate=True)


def swiglu(x: Float[Array, "*b 2*d"]) -> Float[Array, "*b d"]:
    """SwiGLU between an MLP's two products: silu(first half) * second half."""
    gate, value = jnp.split(gradient_written_once(x), 2, axis=-1)
    return nnx.silu(gate) * value


def timestep_embedding(value: Float[Array, " b"]) -> Float[Array, "b c"]:
    """Sinusoids of a value in 0..1000: cosines, then sines, wavelengths 2 pi to 2 pi x 10000.

    Always float32: in bfloat16 the phase near 1000 would be off by radians, where TACA works.
    """
    half = TIMESTEP_CHANNELS // 2
    # Rounded as in the originals: float32 exponents, their exponential rounded to float32. A
    # guidance of 3.5 arrives here as 3500, so an error in a frequency grows 3500-fold in the phase.
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = value.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class MLPEmbedder(nnx.Module):
    """Linear, SiLU, Linear: embeds the time, guidance and pooled text for the modulation vector."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        bias: bool = True,
        **options: Unpack[LayerOptions],
    ):
        self.linear_1 = Linear(in_features, features, bias=bias, **options)
        self.linear_2 = Linear(features, features, bias=bias, **options)

    def __call__(
        self, x: Float[Array, "b i"], lora_scale: LoRAScale | None = None
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
