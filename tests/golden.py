"""What outputs of the originals were computed from, in our layout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def nhwc(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def inputs_at_700(golden: Mapping[str, np.ndarray]) -> tuple[jax.Array, ...]:
    """latents, timestep, txt, pooled."""
    latents = nhwc(golden["latents"])
    return (
        latents,
        jnp.full(len(latents), 700.0),
        jnp.asarray(golden["prompt_embeds"]),
        jnp.asarray(golden["pooled_prompt_embeds"]),
    )
