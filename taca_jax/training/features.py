"""Supervised features: read-outs of image tokens and of words name what they belong to."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from taca_jax.config.fields import check
from taca_jax.data.shapes.labels import BACKGROUND_LABEL, CLASSES
from taca_jax.nn.layers import ZEROS, Linear, layer_norm

LABELS = len(CLASSES)
"""How many labels a patch has."""


@dataclass(frozen=True)
class FeaturesConfig:
    """Supervised features, for a model trained from scratch on generated shapes.

    While the model learns to denoise, a linear read-out of its image tokens learns to name the
    colour, shape and texture of each patch of the clean picture: in noise it can only do so by
    finding in the caption what belongs together. The exported model does not contain it. REPA
    (arXiv 2410.06940) gives such tokens the features of another model as their target; here the
    scene itself is the target.

    weight: of the read-out's loss, in nats, which is added to the loss of the velocity.
    object_weight: how much a patch that shows an object counts, relative to an empty one.
    blocks: the number of blocks of the transformer after which tokens are read (FLUX: from the last
      double block on).
    text_steps: steps in which the text encoder alone is first taught to name, at every word of a
      caption, the colour, shape, texture and count of its object; then it stays as it is, as the
      pretrained encoders of large models do. 0 trains it with the model instead.

    Raises UserError for values out of range.
    """

    weight: float = 1.0
    object_weight: float = 3.0
    blocks: int = 4
    text_steps: int = 350

    def __post_init__(self):
        for name in ("weight", "object_weight"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"features.{name}", value, "positive")
        check(self.blocks >= 1, "features.blocks", self.blocks, "1 or more")
        check(self.text_steps >= 0, "features.text_steps", self.text_steps, "0 (none) or more")


class Readout(nnx.Module):
    """The logits of every label of every token, linear in the normalised tokens.

    classes: how many values each label has.
    """

    def __init__(self, hidden: int, classes: tuple[int, ...] = CLASSES, *, rngs: nnx.Rngs):
        self.linear = Linear(
            hidden,
            sum(classes),
            kernel_init=ZEROS,
            rngs=rngs,
            param_dtype=jnp.float32,
            dtype=jnp.float32,
        )

    def __call__(self, tokens: Float[Array, "b s d"]) -> Float[Array, "b s k"]:
        """Logits, float32: those of each label's classes, one label after another."""
        return self.linear(layer_norm(tokens.astype(jnp.float32)))


def readout_loss(
    logits: Float[Array, "b s k"],
    labels: UInt8[Array, "b rows columns 3"],
    object_weight: float,
) -> Float[Array, ""]:
    """`label_loss` of patches, of which those with an object count `object_weight` times.

    labels: as from `data.shapes.labels.label_patches`, a patch for each token.
    """
    labels = labels.reshape(*logits.shape[:2], LABELS)
    weight = jnp.where(labels[..., 0] == BACKGROUND_LABEL, 1.0, object_weight)
    return label_loss(logits, labels, CLASSES, weight)


def label_loss(
    logits: Float[Array, "b s k"],
    labels: UInt8[Array, "b s n"],
    classes: tuple[int, ...],
    weight: Float[Array, "b s"],
) -> Float[Array, ""]:
    """The cross-entropy in nats, summed over a token's labels; the weighted mean over tokens.

    classes: how many values each label has. Labels of tokens with no weight may have any value.
    """
    starts = [sum(classes[:number]) for number in range(1, len(classes))]
    chosen = jnp.zeros(weight.shape)
    for number, part in enumerate(jnp.split(logits, starts, axis=-1)):
        index = jnp.minimum(labels[..., number, None].astype(jnp.int32), classes[number] - 1)
        chosen += jnp.take_along_axis(jax.nn.log_softmax(part), index, axis=-1)[..., 0]
    return -jnp.sum(chosen * weight) / jnp.sum(weight)
