"""A layer that T5 and CLIP share."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def embedding(rows: int, dim: int, std: float, rngs: nnx.Rngs, param_dtype: DTypeLike) -> nnx.Embed:
    """A table of vectors, looked up in float32; starts normal with deviation `std`."""
    return nnx.Embed(
        rows,
        dim,
        embedding_init=nnx.initializers.normal(std),
        param_dtype=param_dtype,
        dtype=jnp.float32,
        rngs=rngs,
    )
