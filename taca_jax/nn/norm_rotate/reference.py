"""What `norm_rotate` computes, in plain JAX."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from taca_jax.nn.layers import RMSNorm, from_tiles, to_tiles
from taca_jax.nn.rope import Rotation, rotate


def norm_rotate(
    parts: Sequence[Float[Array, "b _ h d"]],
    norms: Sequence[RMSNorm],
    rotation: Rotation | None,
) -> Float[Array, "b s h d"]:
    """As `api.norm_rotate`."""
    normed = [
        from_tiles(norm(to_tiles(part)), part.shape[1])
        for part, norm in zip(parts, norms, strict=True)
    ]
    joint = join(normed)
    return joint if rotation is None else rotate(joint, rotation)


def join(parts: Sequence[Float[Array, "b _ h d"]]) -> Float[Array, "b s h d"]:
    """The parts one after the other; concatenated with merged heads, the TPU's own layout."""
    if len(parts) == 1:
        return parts[0]
    joint = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=1)
    return joint.reshape(*joint.shape[:2], *parts[0].shape[2:])
