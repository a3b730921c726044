"""A gamma(t) that is learnt: TACA's temperature as knots over time, trained on the LoRA's loss."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.nn.layers import LoRAParam
from taca_jax.taca import MAX_TIMESTEP, TacaConfig, between_knots, gamma_at

_SCALE = 10.0
"""log gamma is this times a parameter, so that at a LoRA's learning rate of 3e-4, with which Adam
moves a parameter by at most about as much, gamma moves by 0.3 % a step."""


class LearnedGamma(nnx.Module):
    """gamma(t) = exp of a line through knots, equally spaced from the threshold to 1000.

    It begins as a TacaConfig says. The parameter is trained, averaged and kept in checkpoints as a
    LoRA's factors are; gradients reach it through the attention.
    """

    def __init__(self, taca: TacaConfig, knots: int):
        self.taca = replace(taca, knots=None)
        begin = gamma_at(taca, np.linspace(taca.threshold, MAX_TIMESTEP, knots))
        self.log_gamma = LoRAParam(jnp.log(begin) / _SCALE)

    def __call__(self, timestep: Float[Array, " b"]) -> Float[Array, " b"]:
        """gamma at timesteps at and above the threshold."""
        knots = jnp.exp(_SCALE * self.log_gamma[...])
        return between_knots(knots, self.taca.threshold, timestep)

    def learned(self) -> TacaConfig:
        """What was learnt so far as a configuration, to four decimals."""
        knots = np.exp(_SCALE * np.asarray(self.log_gamma[...], np.float64))
        return replace(self.taca, knots=tuple(round(float(knot), 4) for knot in knots))
