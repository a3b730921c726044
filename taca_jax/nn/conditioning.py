"""What an MM-DiT is told beside its latents and the time."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """What the transformer is told: token embeddings `[b, t, k]`, pooled `[b, p]`, guidance `[b]`.

    `guidance` is the embedded guidance scale, None for models without one.
    """

    txt: Float[Array, "b t k"]
    pooled: Float[Array, "b p"]
    guidance: Float[Array, " b"] | None = None
