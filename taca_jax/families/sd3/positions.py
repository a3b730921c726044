"""Stable Diffusion 3's position table: one vector per row and column; the middle is used."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taca_jax.nn.layers import Fixed

BASE = 64
"""Tokens per side at 1024 px: a new table spreads the positions 0..64 over its whole width."""


class PositionTable(nnx.Module):
    """`embedding` `[size * size, features]`, row-major, in `param_dtype`; never trained.

    Converted models use the table stored in their file.
    """

    def __init__(self, size: int, features: int, *, param_dtype: DTypeLike):
        self.size = size
        self.embedding = Fixed(sinusoids(size, features).astype(param_dtype))

    def __call__(self, rows: int, columns: int) -> Float[Array, "1 s d"]:
        """The middle of the table, float32. Raises ValueError if the table is smaller."""
        if max(rows, columns) > self.size:
            raise ValueError(
                f"latents are {rows} x {columns} tokens; this model has positions for {self.size} "
                f"x {self.size} at most"
            )
        top, left = (self.size - rows) // 2, (self.size - columns) // 2
        table = self.embedding[...].reshape(self.size, self.size, -1)
        middle = table[top : top + rows, left : left + columns].astype(jnp.float32)
        return middle.reshape(1, rows * columns, -1)


def sinusoids(size: int, features: int) -> Float[Array, "s d"]:
    """Sinusoids of the column and row of each position, float32.

    The first half of the features encodes the column, the second the row: sines, then cosines.
    Source: diffusers' `get_2d_sincos_pos_embed`.
    """
    half = features // 2
    # Computed in float64 as in the original, so that the float32 table is the same to the last bit.
    phase = np.outer(
        np.arange(size) * (BASE / size), 10_000.0 ** (-np.arange(half // 2) * 4 / features)
    )
    line = jnp.asarray(np.concatenate([np.sin(phase), np.cos(phase)], axis=1), jnp.float32)
    columns = jnp.broadcast_to(line[None, :], (size, size, half))
    rows = jnp.broadcast_to(line[:, None], (size, size, half))
    return jnp.concatenate([columns, rows], axis=-1).reshape(size * size, features)
