"""Supervised features: a read-out of the image tokens names what each patch of a picture shows."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from taca_jax.config.fields import check
from taca_jax.data.shapes.labels import CLASSES
from taca_jax.nn.layers import ZEROS, Linear, layer_norm

LABELS = len(CLASSES)
"""How many labels a patch has."""


@dataclass(frozen=True)
class FeaturesConfig:
    """Supervised features, for a model trained from scratch on generated shapes.

    While the model learns to denoise, a linear read-out of its image tokens (`Family.with_features`
    says which) learns to name the colour, shape and texture of each patch of the clean picture. The
    exported model does not contain it. REPA (arXiv 2410.06940) gives such tokens the features of
    another model as their target; here the scene itself is the target.

    weight: of the read-out's loss, in nats, which is added to the loss of the velocity.

    Raises UserError for a weight that is not positive.
    """

    weight: float = 0.2

    def __post_init__(self):
        check(0 < self.weight < math.inf, "features.weight", self.weight, "positive")


class Readout(nnx.Module):
    """The logits of every label of every patch, linear in the normalised image tokens."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.linear = Linear(
            hidden,
            sum(CLASSES),
            kernel_init=ZEROS,
            rngs=rngs,
            param_dtype=jnp.float32,
            dtype=jnp.float32,
        )

    def __call__(self, tokens: Float[Array, "b s d"]) -> Float[Array, "b s k"]:
        """Logits, float32: those of each label's classes, one label after another."""
        return self.linear(layer_norm(tokens.astype(jnp.float32)))


def readout_loss(
    logits: Float[Array, "b s k"], labels: UInt8[Array, "b rows columns 3"]
) -> Float[Array, ""]:
    """The cross-entropy in nats, summed over the labels of a patch and averaged over patches.

    labels: as from `data.shapes.labels.label_patches`, a patch for each token.
    """
    per_token = labels.reshape(*logits.shape[:2], LABELS).astype(jnp.int32)
    starts = [sum(CLASSES[:number]) for number in range(1, LABELS)]
    total = jnp.float32(0)
    for number, part in enumerate(jnp.split(logits, starts, axis=-1)):
        log_probability = jax.nn.log_softmax(part)
        chosen = jnp.take_along_axis(log_probability, per_token[..., number, None], axis=-1)
        total -= chosen.mean()
    return total
