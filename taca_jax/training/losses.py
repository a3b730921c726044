"""The flow-matching objective and the distribution of its timesteps."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from taca_jax.taca import MAX_TIMESTEP

TimestepSampling = Literal["uniform", "logit_normal"]


def sample_timesteps(
    rng: jax.Array,
    samples: int,
    *,
    sampling: TimestepSampling,
    shift: float = 1.0,
    above: float = 0.0,
) -> Float[Array, " b"]:
    """Timesteps in (above, 1000], float32.

    `uniform`, or `logit_normal` (the sigmoid of a standard normal, SD3's choice), then shifted
    towards noise, sigma <- shift sigma / (1 + (shift - 1) sigma) (equation 23 of the SD3 paper,
    arXiv 2403.03206), all restricted to that range: TACA trains its LoRA on t in (t_thresh, 1000]
    (arXiv 2506.07986, equation 11).
    """
    # In (0, 1], so that the range's end is included: pure noise, where all sampling starts.
    u = 1.0 - jax.random.uniform(rng, (samples,))
    low = above / MAX_TIMESTEP
    low = low / (shift - (shift - 1) * low)  # the noise level that is shifted to `above`
    if sampling == "uniform":
        sigma = low + (1 - low) * u
    else:
        # From the upper tail, because float32 has no precision left where the CDF is near 1.
        tail = norm.cdf(jnp.log1p(-low) - jnp.log(low)) if low > 0 else 1.0
        sigma = jax.nn.sigmoid(-norm.ppf(tail * (1.0 - u)))
    timestep = jnp.minimum(MAX_TIMESTEP * shift * sigma / (1 + (shift - 1) * sigma), MAX_TIMESTEP)
    # Rounding may give `above` itself, which is excluded: TACA is not active there.
    return jnp.maximum(timestep, np.nextafter(np.float32(above), np.inf)) if above else timestep


def interpolate(
    x0: Float[Array, "b *s"], noise: Float[Array, "b *s"], timestep: Float[Array, " b"]
) -> Float[Array, "b *s"]:
    """x_t = (1 - sigma) x0 + sigma noise, sigma = timestep / 1000."""
    sigma = (timestep / MAX_TIMESTEP).reshape(-1, *(1,) * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise


def flow_matching_loss(
    velocity: Float[Array, "b *s"], x0: Float[Array, "b *s"], noise: Float[Array, "b *s"]
) -> Float[Array, ""]:
    """Mean squared error of the predicted velocity against noise - x0, in float32."""
    target = (noise - x0).astype(jnp.float32)
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - target))
