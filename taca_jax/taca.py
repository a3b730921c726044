"""Temperature-Adjusted Cross-modal Attention: when it acts, and how strongly.

TACA (arXiv 2506.07986) multiplies the logits of image-query x text-key pairs by a temperature
gamma(t) > 1 while the composition is being decided, early in denoising (equations 7-8 of the
paper), and leaves every other pair as it is. Where the text stands in the joint sequence is the
attention's `text_len`: text tokens come first in all our models. This file holds the rest of the
idea: gamma as a function of time, and the gate of the LoRA that is trained under it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from taca_jax.errors import UserError

MAX_TIMESTEP = 1000.0
"""Timesteps run from 0 (data) to 1000 (noise), after the sampler's shift."""

Schedule = Literal["step", "linear", "cosine", "sigmoid"]

_SIGMOID_STEEPNESS = 10.0


@dataclass(frozen=True)
class TacaConfig:
    """When image queries listen harder to text keys.

    gamma: the temperature at its fullest; 1 is plain attention.
    threshold: TACA is active while timestep >= threshold, in 0..1000 (the paper: 970).
    schedule: `step` is gamma at once (the paper); `linear`, `cosine` and `sigmoid` rise from 1
      at the threshold to gamma at timestep 1000.
    first_steps: act on that many first sampling steps instead, whatever their timestep is, at full
      gamma (the authors' pipelines: 3). Of sampling only: training has no steps, and refuses it.
    cond_only: in sampling under classifier-free guidance, leave the unconditional half plain
      (published: both).

    Raises UserError for a gamma that is not positive and finite, first_steps below 0, or a
    threshold outside 0..1000.
    """

    gamma: float = 1.2
    threshold: float = 970.0
    schedule: Schedule = "step"
    first_steps: int | None = None
    cond_only: bool = False

    def __post_init__(self):
        if not 0 < self.gamma < math.inf:
            raise UserError(
                f"taca.gamma is {self.gamma}; it must be positive and finite (1 is plain attention)"
            )
        if not 0 <= self.threshold <= MAX_TIMESTEP:
            raise UserError(f"taca.threshold is {self.threshold}; timesteps are in 0..1000")
        if self.first_steps is not None and self.first_steps < 0:
            raise UserError(
                f"taca.first_steps is {self.first_steps}; it must be 0 or more, or none"
            )


def active(
    config: TacaConfig, timestep: Float[ArrayLike, "*b"], step: ArrayLike | None = None
) -> Bool[Array, "*b"]:
    """Whether TACA acts: `timestep >= threshold`, or `step < first_steps` where that is set.

    `step` is the zero-based sampling step (scalar or `[b]`); without it (training) the threshold
    decides. Everything may be traced.
    """
    timestep = jnp.asarray(timestep)
    if config.first_steps is not None and step is not None:
        return jnp.broadcast_to(jnp.asarray(step) < config.first_steps, timestep.shape)
    return timestep >= config.threshold


def gamma_at(
    config: TacaConfig, timestep: Float[ArrayLike, "*b"], step: ArrayLike | None = None
) -> Float[Array, "*b"]:
    """The float32 temperature of each sample; exactly 1 where TACA is not active."""
    timestep = jnp.asarray(timestep, jnp.float32)
    rise = jnp.float32(1.0)
    if config.first_steps is None or step is None:
        span = max(MAX_TIMESTEP - config.threshold, 1e-6)
        x = jnp.clip((timestep - config.threshold) / span, 0.0, 1.0)
        rise = _SHAPES[config.schedule](x)
    return jnp.where(active(config, timestep, step), 1.0 + (config.gamma - 1.0) * rise, 1.0)


def _sigmoid(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """A logistic curve, stretched to pass through (0, 0) and (1, 1) exactly."""
    low = 1 / (1 + jnp.exp(_SIGMOID_STEEPNESS / 2))
    return (1 / (1 + jnp.exp(-_SIGMOID_STEEPNESS * (x - 0.5))) - low) / (1 - 2 * low)


_SHAPES = {
    "step": jnp.ones_like,
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 - 0.5 * jnp.cos(jnp.pi * x),
    "sigmoid": _sigmoid,
}
