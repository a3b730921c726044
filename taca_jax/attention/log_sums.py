"""How much attention goes to text, as the softmax's own sums."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class LogSums(NamedTuple):
    """Log-sum-exps of each query's logits, gamma included: float32, natural.

    whole: over all keys. text: over text keys; minus infinity where there are none.
    """

    whole: Float[Array, "b h s"]
    text: Float[Array, "b h s"]

    @property
    def text_mass(self) -> Float[Array, "b h s"]:
        """The share, 0 to 1, of its attention that each query pays to text."""
        return jnp.exp(self.text - self.whole)
