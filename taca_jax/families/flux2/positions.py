"""FLUX.2's rotary positions over (index, row, column, token)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from taca_jax.nn.rope import Rotation, position_table


def joint_rotation(
    text_len: int, rows: int, columns: int, *, axes_dim: tuple[int, int, int, int], theta: float
) -> Rotation:
    """The rotation of `text_len` text tokens, then of a `rows` x `columns` grid.

    Text token i is at (0, 0, 0, i), the image token of a row and a column at (0, row, column, 0).
    Source: black-forest-labs/flux2, sampling.py; diffusers' `Flux2PosEmbed`.
    """
    nowhere = [position_table(np.zeros(1), dim, theta) for dim in axes_dim]
    row = position_table(np.arange(rows), axes_dim[1], theta)
    column = position_table(np.arange(columns), axes_dim[2], theta)
    token = position_table(np.arange(text_len), axes_dim[3], theta)

    def joint(part: int) -> Float[Array, "s d"]:
        # Only the small tables are constants of the program; the grid is computed on the device.
        index, top, left, first = (table[part] for table in nowhere)
        over_image = (index[:, None], row[part][:, None], column[part][None], first[:, None])
        image = jnp.concatenate(
            [jnp.broadcast_to(p, (rows, columns, p.shape[-1])) for p in over_image], axis=-1
        ).reshape(rows * columns, -1)
        over_text = (index, top, left, token[part])
        text = jnp.concatenate(
            [jnp.broadcast_to(p, (text_len, p.shape[-1])) for p in over_text], axis=-1
        )
        return jnp.concatenate([text, image])

    return Rotation(cos=joint(0), sin=joint(1))
