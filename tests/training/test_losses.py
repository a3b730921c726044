"""The flow-matching objective: where it is asked, between what, and how it pulls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from taca_jax.training.losses import flow_matching_loss, interpolate, sample_timesteps

MANY = 20_000


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("above", [0.0, 1.0, 500.0, 835.0, 940.0, 970.0, 999.0, 999.9])
def test_timesteps_are_above_and_at_most_1000(sampling, above):
    timestep = np.asarray(sample_timesteps(jax.random.key(0), MANY, sampling=sampling, above=above))
    assert timestep.dtype == np.float32
    assert timestep.min() > np.float32(above)
    assert timestep.max() <= 1000
    assert len(np.unique(timestep)) > 300


@given(st.floats(0, 999, width=32), st.floats(0.1, 10), st.integers(0, 100))
def test_no_threshold_is_met_exactly(above, shift, seed):
    for sampling in ("uniform", "logit_normal"):
        drawn = np.asarray(
            sample_timesteps(jax.random.key(seed), 64, sampling=sampling, shift=shift, above=above)
        )
        assert (drawn > np.float32(above)).all(), sampling
        assert (drawn <= 1000).all(), sampling


@pytest.mark.parametrize("above", [0.0, 500.0, 970.0, 999.0])
def test_uniform_timesteps_are_uniform(above):
    drawn = sample_timesteps(jax.random.key(1), MANY, sampling="uniform", above=above)
    assert stats.kstest(np.asarray(drawn), stats.uniform(above, 1000 - above).cdf).pvalue > 1e-3


@pytest.mark.parametrize("above", [0.0, 500.0, 970.0, 999.0])
def test_logit_normal_timesteps_are_that_distribution_cut_off(above):
    drawn = np.asarray(
        sample_timesteps(jax.random.key(2), MANY, sampling="logit_normal", above=above), np.float64
    )
    low = -np.inf if above == 0 else np.log(above / (1000 - above))
    drawn = np.minimum(drawn, 1000 * (1 - 2**-25))  # rounded to 1000, where the logit has no end
    logit = np.log(drawn) - np.log(1000 - drawn)
    expected = stats.truncnorm(low, np.inf)
    # Near 1000 float32 has few timesteps, so that the logits are in steps.
    distance = stats.kstest(logit, expected.cdf).statistic
    assert distance < (0.02 if above < 999 else 0.04)


@pytest.mark.parametrize("above", [0.0, 500.0, 970.0])
@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_timesteps_are_those_of_the_whole_range_that_are_above(shift, above):
    """The inverse of the shift makes them uniform again, between what it makes of the ends."""

    def unshifted(timestep):
        return timestep / (shift - (shift - 1) * timestep / 1000)

    drawn = sample_timesteps(jax.random.key(3), MANY, sampling="uniform", shift=shift, above=above)
    low = unshifted(above)
    even = unshifted(np.asarray(drawn, np.float64))
    assert stats.kstest(even, stats.uniform(low, 1000 - low).cdf).pvalue > 1e-3


def test_timesteps_follow_the_key():
    def draw(seed):
        return np.asarray(sample_timesteps(jax.random.key(seed), 8, sampling="uniform"))

    assert np.array_equal(draw(3), draw(3))
    assert not np.array_equal(draw(3), draw(4))


def test_interpolation_runs_from_data_to_noise():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    timestep = jnp.array([0.0, 1000.0, 250.0])
    x = interpolate(x0, noise, timestep)
    assert np.array_equal(x[0], x0[0])
    assert np.array_equal(x[1], noise[1])
    np.testing.assert_allclose(x[2], 0.75 * x0[2] + 0.25 * noise[2], rtol=1e-6)


def test_the_velocity_is_the_derivative_of_the_interpolation():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    timestep = jnp.array([10.0, 500.0, 990.0])
    _, slope = jax.jvp(lambda t: interpolate(x0, noise, t), (timestep,), (jnp.full(3, 1000.0),))
    assert float(flow_matching_loss(slope, x0, noise)) < 1e-9


def test_the_loss_is_the_mean_square_and_pulls_towards_noise_minus_data():
    x0, noise, velocity = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 2))
    loss, gradient = jax.value_and_grad(flow_matching_loss)(velocity, x0, noise)
    error = np.asarray(velocity - (noise - x0), np.float64)
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * error / error.size, rtol=1e-4, atol=1e-7)


def test_the_loss_is_float32_for_a_bfloat16_velocity():
    x0 = jnp.zeros((1, 2, 2, 3), jnp.bfloat16)
    loss = flow_matching_loss(x0 + 1, x0, x0 + 1)
    assert loss.dtype == jnp.float32
    assert loss == 0
