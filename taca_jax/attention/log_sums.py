"""How much attention each query pays to text, from the sums of its softmax."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class LogSums(NamedTuple):
    """Log-sum-exps of each query's logits (with gamma), in float32 and in base e.

    whole: over all keys. text: over the text keys; minus infinity where there are none.
    """

    whole: Float[Array, "b h s"]
    text: Float[Array, "b h s"]

    @property
    def text_mass(self) -> Float[Array, "b h s"]:
        """The share, 0 to 1, of its attention that each query pays to text: float32."""
        return jnp.exp(self.text - self.whole)
