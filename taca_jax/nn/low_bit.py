"""Products with kernels that are stored in 8 or 4 bits and decoded where they are used.

`int8`: codes -127..127 and a float32 scale for each output. The scale is applied to the product's
outputs, so that no wider copy of the kernel is made: the TPU compiler converts the codes on their
way into the matrix unit, at the cost of a bfloat16 product.

`nf4`: 4-bit codes, which a TPU packs two to a byte, and a bfloat16 scale for each block of
consecutive inputs of an output. A code stands for one of 16 levels, quantiles of a normal
distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E). The levels are selected by the
bits of the code, which the TPU compiler fuses with unpacking and scaling: one pass over the kernel,
no slower than evenly spaced levels.

There are gradients for the inputs only. The backward pass keeps codes and scales, and decodes them
again.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Quantization = Literal["none", "int8", "nf4"]
"""The number format of stored kernels."""

INT8_MAX = 127

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Source: bitsandbytes, functional.py (`create_normal_map`, and the table of `get_4bit_type`)."""

Codes = Int[Array, "*layers i o"]
"""int8, or uint4 for nf4. int8 has one block, of all inputs."""
Scales = Float[Array, "*layers blocks o"]


@jax.custom_vjp
def low_bit_matmul(
    x: Float[Array, "*s i"], codes: Int[Array, "i o"], scales: Float[Array, "blocks o"]
) -> Float[Array, "*s o"]:
    """x @ kernel in x's dtype, the kernel given by its codes and scales."""
    if codes.dtype == jnp.int8:
        y = jnp.matmul(x, codes.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * scales[0]).astype(x.dtype)
    return x @ decode(codes, scales, x.dtype)


def _forward(x: jax.Array, codes: jax.Array, scales: jax.Array) -> tuple[jax.Array, tuple]:
    return low_bit_matmul(x, codes, scales), (codes, scales)


def _backward(saved: tuple, dy: jax.Array) -> tuple[jax.Array, np.ndarray, jax.Array]:
    codes, scales = saved
    if codes.dtype == jnp.int8:
        scaled = (dy.astype(jnp.float32) * scales[0]).astype(dy.dtype)
        dx = scaled @ codes.astype(dy.dtype).T
    else:
        dx = dy @ decode(codes, scales, dy.dtype).T
    # The kernel is frozen: integer codes have no gradient, and that of the scales is not used.
    return dx, np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(scales)


low_bit_matmul.defvjp(_forward, _backward)


def decode(codes: Codes, scales: Scales, dtype: DTypeLike) -> Float[Array, "*layers i o"]:
    """The kernel of these codes and scales, computed in float32, then rounded to `dtype`."""
    *layers, inputs, outputs = codes.shape
    blocks = scales.shape[-2]
    values = codes.astype(jnp.float32) if codes.dtype == jnp.int8 else _levels(codes)
    by_block = values.reshape(*layers, blocks, inputs // blocks, outputs)
    scaled = by_block * scales.astype(jnp.float32)[..., None, :]
    return scaled.reshape(codes.shape).astype(dtype)


def _levels(codes: Codes) -> Float[Array, "*layers i o"]:
    """The level of each code, selected by its bits, lowest first: gathers are slow on a TPU."""
    number = codes.astype(jnp.int32)
    choices = [jnp.float32(level) for level in NF4_LEVELS]
    while len(choices) > 1:
        odd = (number & 1) == 1
        number >>= 1
        pairs = zip(choices[::2], choices[1::2], strict=True)
        choices = [jnp.where(odd, high, low) for low, high in pairs]
    return choices[0]
