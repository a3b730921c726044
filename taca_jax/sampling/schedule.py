"""The noise levels that sampling visits."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from taca_jax.errors import UserError


@dataclass(frozen=True)
class FlowSchedule:
    """The noise levels of a run of n steps.

    FLUX shifts them towards noise by the factor exp(mu), where mu is `linear` in the number of
    image tokens, through (base_tokens, base_shift) and (max_tokens, max_shift), or an `empirical`
    function of them and of n (FLUX.2). A `shift` is a constant factor instead (schnell: 1, SD3: 3).
    `last_sigma` is the noise level, before the shift, at the start of the last step; None is 1 / n.
    Source: diffusers' FlowMatchEulerDiscreteScheduler.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    shift: float | None = None
    last_sigma: float | None = None
    mu: Literal["linear", "empirical"] = "linear"

    def sigmas(self, steps: int, image_tokens: int) -> np.ndarray:
        """float32 `[steps + 1]` from 1 (noise) to 0 (data).

        Raises UserError for fewer than one step.
        """
        if steps < 1:
            raise UserError(f"steps is {steps}; sampling takes 1 or more")
        factor = self.shift
        if factor is None:
            factor = np.exp(self._mu(steps, image_tokens))
        last = 1.0 / steps if self.last_sigma is None else self.last_sigma
        sigma = np.linspace(1.0, last, steps)
        sigma = factor * sigma / (1 + (factor - 1) * sigma)
        return np.append(sigma, 0.0).astype(np.float32)

    def _mu(self, steps: int, image_tokens: int) -> float:
        if self.mu == "empirical":
            return _empirical_mu(steps, image_tokens)
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (image_tokens - self.base_tokens)


_MANY_TOKENS = 4300
"""From here on the number of steps makes no difference to an empirical mu."""


def _empirical_mu(steps: int, image_tokens: int) -> float:
    """Linear in the steps, through lines in the tokens that were fitted at 10 and at 200 steps.

    Source: black-forest-labs/flux2, sampling.py; diffusers' `compute_empirical_mu`.
    """
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > _MANY_TOKENS:
        return at_200
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)
