"""Layers that the image and text towers of the scorers share."""

from typing import Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from taca_jax.attention import joint_attention
from taca_jax.nn.layers import LayerOptions

INIT_STD = 0.02

Activation = Literal["quick_gelu", "gelu"]
"""x * sigmoid(1.702 x), or the exact GELU."""


def linear(
    in_dim: int, out_dim: int, *, bias: bool = True, **options: Unpack[LayerOptions]
) -> nnx.Linear:
    init = nnx.initializers.normal(INIT_STD)
    return nnx.Linear(in_dim, out_dim, use_bias=bias, kernel_init=init, **options)


def layer_norm(
    dim: int, epsilon: float, *, rngs: nnx.Rngs, param_dtype: DTypeLike
) -> nnx.LayerNorm:
    """A LayerNorm that computes in float32."""
    return nnx.LayerNorm(
        dim,
        epsilon=epsilon,
        use_fast_variance=False,
        param_dtype=param_dtype,
        dtype=jnp.float32,
        rngs=rngs,
    )


def activate(x: Float[Array, "*b d"], activation: Activation) -> Float[Array, "*b d"]:
    if activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=False)


class Attention(nnx.Module):
    """Attention to its own tokens, or to those of a context of as many channels."""

    def __init__(self, dim: int, num_heads: int, **options: Unpack[LayerOptions]):
        self.num_heads = num_heads
        self.q = linear(dim, dim, **options)
        self.k = linear(dim, dim, **options)
        self.v = linear(dim, dim, **options)
        self.o = linear(dim, dim, **options)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Float[Array, "b s d"] | None = None,
        mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b t d"]:
        """mask: the keys that count; all if None."""
        keys = x if context is None else context
        q, k, v = (
            array.reshape(*array.shape[:2], self.num_heads, -1)
            for array in (self.q(x), self.k(keys), self.v(keys))
        )
        # The softmax of both is float32 whatever the dtype of its inputs.
        if context is None and mask is None:
            attended = joint_attention(q, k, v, text_len=0)  # fast on every device
        else:
            counts = None if mask is None else mask[:, None, None, :]
            attended = jax.nn.dot_product_attention(q, k, v, mask=counts, implementation="xla")
        return self.o(attended.reshape(x.shape))


class FeedForward(nnx.Module):
    """wo(activation(wi(x)))."""

    def __init__(
        self, dim: int, ff_dim: int, activation: Activation, **options: Unpack[LayerOptions]
    ):
        self.activation: Activation = activation
        self.wi = linear(dim, ff_dim, **options)
        self.wo = linear(ff_dim, dim, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.wo(activate(self.wi(x), self.activation))
