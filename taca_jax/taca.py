"""Temperature-Adjusted Cross-modal Attention: when it acts, and how strongly.

TACA (arXiv 2506.07986, equations 7-8) multiplies the attention logits of image queries with text
keys by a temperature gamma(t) > 1 early in denoising, while the composition is being decided. All
other logits stay as they are. This module says what gamma is at a timestep, and whether TACA, and
with it the LoRA that is trained under it, acts there; `attention` applies gamma to the logits.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from taca_jax.errors import UserError

MAX_TIMESTEP = 1000.0
"""Timesteps run from 0 (data) to 1000 (noise); they are 1000 sigma, after the sampler's shift."""

Schedule = Literal["step", "linear", "cosine", "sigmoid"]

Gate = Literal["always", "taca"]
"""When a LoRA acts: always, as a style does, or exactly while TACA is `active`, as one that was
trained under TACA."""

_SIGMOID_STEEPNESS = 10.0


@dataclass(frozen=True)
class TacaConfig:
    """When image queries attend more to text keys, and by how much.

    gamma: the temperature at its fullest; 1 is plain attention.
    threshold: TACA is active while timestep >= threshold, in 0..1000 (the paper: 970).
    schedule: `step` is gamma at once (the paper); `linear`, `cosine` and `sigmoid` rise from 1
      at the threshold to gamma at timestep 1000.
    first_steps: act on that many first sampling steps instead, whatever their timestep is, at full
      gamma (the authors' pipelines: 3). Of sampling only: training has no steps, and refuses it.
    cond_only: in sampling under classifier-free guidance, leave the unconditional half plain
      (published: both).
    knots: gamma at equally spaced timesteps from the threshold to 1000, joined by straight lines,
      in place of gamma and schedule: such as training learns them. At least two.

    Raises UserError for a gamma that is not positive and finite, first_steps below 0, a threshold
    outside 0..1000, one in (0, 1], which is meant as a share of 1000, fewer than two knots, and
    knots with first_steps, which has no times.
    """

    gamma: float = 1.2
    threshold: float = 970.0
    schedule: Schedule = "step"
    first_steps: int | None = None
    cond_only: bool = False
    knots: tuple[float, ...] | None = None

    def __post_init__(self):
        for name, gammas in {"gamma": (self.gamma,), "knots": self.knots or ()}.items():
            if not all(0 < gamma < math.inf for gamma in gammas):
                given = ",".join(map(str, gammas))
                raise UserError(
                    f"taca.{name} is {given}; it must be positive and finite (1 is plain attention)"
                )
        if self.knots is not None and (len(self.knots) < 2 or self.first_steps is not None):
            raise UserError(
                f"taca.knots is {self.knots}; it must be two or more values of gamma over times, "
                "without first_steps"
            )
        if not 0 <= self.threshold <= MAX_TIMESTEP:
            raise UserError(f"taca.threshold is {self.threshold}; timesteps are in 0..1000")
        if 0 < self.threshold <= 1:
            raise UserError(
                f"taca.threshold is {self.threshold}; timesteps run from 0 to 1000: did you mean "
                f"{MAX_TIMESTEP * self.threshold:g}?"
            )
        if self.first_steps is not None and self.first_steps < 0:
            raise UserError(
                f"taca.first_steps is {self.first_steps}; it must be 0 or more, or none"
            )


def active(
    config: TacaConfig, timestep: Float[ArrayLike, "*b"], step: ArrayLike | None = None
) -> Bool[Array, "*b"]:
    """Whether TACA acts on each sample: `timestep >= threshold`, or `step < first_steps` if set.

    timestep: in 0..1000. step: the sampling step, counted from 0, one for all samples or `[b]`;
    without it, as in training, the threshold decides. Both may be traced.
    """
    timestep = jnp.asarray(timestep)
    if config.first_steps is not None and step is not None:
        return jnp.broadcast_to(jnp.asarray(step) < config.first_steps, timestep.shape)
    return timestep >= config.threshold


def gamma_at(
    config: TacaConfig, timestep: Float[ArrayLike, "*b"], step: ArrayLike | None = None
) -> Float[Array, "*b"]:
    """The temperature of each sample, float32; exactly 1 where TACA is not `active`."""
    timestep = jnp.asarray(timestep, jnp.float32)
    gamma = jnp.float32(config.gamma)
    if config.first_steps is None or step is None:
        if config.knots is not None:
            gamma = between_knots(jnp.array(config.knots), config.threshold, timestep)
        else:
            rise = _SHAPES[config.schedule](_progress(config.threshold, timestep))
            gamma = 1.0 + (config.gamma - 1.0) * rise
    return jnp.where(active(config, timestep, step), gamma, 1.0)


def between_knots(
    knots: Float[Array, " n"], threshold: float, timestep: Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """Values between `knots`, equally spaced from the threshold to 1000, joined by straight lines;
    differentiable in the knots."""
    return jnp.interp(_progress(threshold, timestep), jnp.linspace(0, 1, len(knots)), knots)


def _progress(threshold: float, timestep: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """0 at the threshold and below it, 1 at timestep 1000."""
    return jnp.clip((timestep - threshold) / max(MAX_TIMESTEP - threshold, 1e-6), 0.0, 1.0)


def describe_gamma(config: TacaConfig) -> str:
    """Its gamma in a few words: `gamma 1.2`, `gamma up to 1.2 (linear)`, `gamma by 6 knots`."""
    if config.knots is not None:
        return f"gamma by {len(config.knots)} knots"
    if config.schedule == "step" or config.first_steps is not None:
        return f"gamma {config.gamma:g}"
    return f"gamma up to {config.gamma:g} ({config.schedule})"


def describe_steps(config: TacaConfig, timesteps: Sequence[float] | np.ndarray) -> str:
    """On which sampling steps TACA acts, in a line: `TACA acts on steps 1 to 3 of 30 (t >= 970)`.

    timesteps: of all the steps in their order, each in 0..1000. Where gamma changes with time, the
    line says its range over the steps.
    """
    times = np.asarray(timesteps, np.float32)
    steps = np.arange(len(times))
    acts = np.asarray(active(config, times, steps))
    which = _ranges(steps[acts] + 1)
    if len(which) == 0:
        where = f"none of {len(times)} steps"
    else:
        one = acts.sum() == 1
        where = f"{'step' if one else 'steps'} {', '.join(which)} of {len(times)}"
    if config.first_steps is not None:
        return f"TACA acts on {where} (first_steps={config.first_steps})"
    line = f"TACA acts on {where} (t >= {config.threshold:g})"
    if (config.schedule == "step" and config.knots is None) or not which:
        return line
    gamma = np.asarray(gamma_at(config, times, steps))[acts]
    shape = config.schedule if config.knots is None else f"{len(config.knots)} knots"
    return f"{line}, gamma {gamma.min():.4g} to {gamma.max():.4g} ({shape})"


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Rising whole numbers in words: 1, 2, 3 and 7 are `1 to 3` and `7`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return [f"{r[0]}" if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in ranges]


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
