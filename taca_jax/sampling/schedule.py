"""The noise levels that sampling visits."""

from dataclasses import dataclass

import numpy as np

from taca_jax.errors import UserError


@dataclass(frozen=True)
class FlowSchedule:
    """The noise levels of a run of n steps.

    FLUX shifts them towards noise by the factor exp(mu), where mu is linear in the number of image
    tokens, through (base_tokens, base_shift) and (max_tokens, max_shift). A `shift` is a constant
    factor instead (schnell: 1, SD3: 3). `last_sigma` is the noise level, before the shift, at the
    start of the last step; None is 1 / n. Source: diffusers' FlowMatchEulerDiscreteScheduler.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    shift: float | None = None
    last_sigma: float | None = None

    def sigmas(self, steps: int, image_tokens: int) -> np.ndarray:
        """float32 `[steps + 1]` from 1 (noise) to 0 (data).

        Raises UserError for fewer than one step.
        """
        if steps < 1:
            raise UserError(f"steps is {steps}; sampling takes 1 or more")
        factor = self.shift
        if factor is None:
            slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
            factor = np.exp(self.base_shift + slope * (image_tokens - self.base_tokens))
        last = 1.0 / steps if self.last_sigma is None else self.last_sigma
        sigma = np.linspace(1.0, last, steps)
        sigma = factor * sigma / (1 + (factor - 1) * sigma)
        return np.append(sigma, 0.0).astype(np.float32)
