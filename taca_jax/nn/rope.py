"""FLUX's rotary position embedding over (index, row, column)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from taca_jax.nn.layers import from_tiles, to_tiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotation:
    """Cosines and signed sines of each token's angles, float32; each pair of channels has one
    angle."""

    cos: Float[Array, "s d"]
    sin: Float[Array, "s d"]


def joint_rotation(
    text_len: int, rows: int, columns: int, *, axes_dim: tuple[int, int, int], theta: float
) -> Rotation:
    """The rotation of `text_len` text tokens at position zero, then of a `rows` x `columns` grid.

    Axis 0 (the image's index) is always zero; axes 1 and 2 are the row and the column.
    Angles are computed in float64, as the originals do. Source: flux/math.py, `rope`.
    """
    index = position_table(np.zeros(1), axes_dim[0], theta)
    row = position_table(np.arange(rows), axes_dim[1], theta)
    column = position_table(np.arange(columns), axes_dim[2], theta)

    def grid(part: int) -> Float[Array, "s d"]:
        # Only the small tables are constants of the program; the grid is computed on the device.
        pieces = (index[part][:, None], row[part][:, None], column[part][None])
        image = jnp.concatenate(
            [jnp.broadcast_to(p, (rows, columns, p.shape[-1])) for p in pieces], axis=-1
        ).reshape(rows * columns, -1)
        text = jnp.full((text_len, image.shape[-1]), 1.0 if part == 0 else 0.0, image.dtype)
        return jnp.concatenate([text, image])

    return Rotation(cos=grid(0), sin=grid(1))


@jax.custom_vjp
def rotate(x: Float[Array, "b s h d"], rotation: Rotation) -> Float[Array, "b s h d"]:
    """Rotates each pair (2i, 2i + 1) of the last axis by its angle, in float32; only x has a
    gradient."""
    return jax.lax.platform_dependent(x, rotation, cpu=_by_rolls, default=_by_product)


def _rotate_forward(x: jax.Array, rotation: Rotation) -> tuple[jax.Array, Rotation]:
    return rotate(x, rotation), rotation


def _rotate_backward(rotation: Rotation, dy: jax.Array) -> tuple[jax.Array, Rotation]:
    back = Rotation(cos=rotation.cos, sin=-rotation.sin)
    return rotate(dy, back), jax.tree.map(jnp.zeros_like, rotation)


rotate.defvjp(_rotate_forward, _rotate_backward)


def _by_rolls(x: Float[Array, "b s h d"], rotation: Rotation) -> Float[Array, "b s h d"]:
    """Swaps the elements of each pair by rolls; reshaping to an axis of size 2 would be slow."""
    y = x.astype(jnp.float32)
    even = jnp.arange(x.shape[-1]) % 2 == 0
    partner = jnp.where(even, jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1))
    return (y * rotation.cos[:, None] + partner * rotation.sin[:, None]).astype(x.dtype)


def _by_product(x: Float[Array, "b s h d"], rotation: Rotation) -> Float[Array, "b s h d"]:
    """Swaps the elements of each pair by a product with a permutation matrix, bit-exactly.

    That is almost free on a TPU's matrix unit; rolls along lanes cost more than attention.
    """
    y = to_tiles(x)
    cos, sin = (to_tiles(table[None, :, None]) for table in (rotation.cos, rotation.sin))
    swap = jnp.asarray(np.eye(x.shape[-1])[np.arange(x.shape[-1]) ^ 1], x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    partner = jnp.matmul(y, swap, precision=precision, preferred_element_type=jnp.float32)
    y = (y.astype(jnp.float32) * cos + partner * sin).astype(x.dtype)
    return from_tiles(y, x.shape[1])


def position_table(
    position: np.ndarray, dim: int, theta: float
) -> tuple[Float[Array, "p d"], Float[Array, "p d"]]:
    """The cosines, and the sines negated on even channels, of each position and channel."""
    frequency = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = np.repeat(position[:, None] * frequency, 2, axis=-1)
    sign = np.where(np.arange(dim) % 2 == 0, -1.0, 1.0)
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle) * sign, jnp.float32)
