"""The inputs of an MM-DiT besides its latents and the time."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """Embeddings of the text tokens and of the whole prompt, and the guidance scale.

    `guidance` is None for models without a guidance embedding.
    """

    txt: Float[Array, "b t k"]
    pooled: Float[Array, "b p"]
    guidance: Float[Array, " b"] | None = None
