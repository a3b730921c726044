"""When TACA acts and how strongly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taca_jax.errors import UserError
from taca_jax.taca import TacaConfig, active, describe_gamma, describe_steps, gamma_at

SCHEDULES = ("step", "linear", "cosine", "sigmoid")
SMOOTH = SCHEDULES[1:]

configs = st.builds(
    TacaConfig,
    gamma=st.floats(0.5, 4.0),
    threshold=st.just(0.0) | st.floats(1.0, 999.0, exclude_min=True),
    schedule=st.sampled_from(SCHEDULES),
)
timesteps = st.lists(st.floats(0.0, 1000.0, width=32), min_size=1, max_size=8)


def test_the_paper_is_the_default():
    config = TacaConfig()
    given = jnp.array([1000.0, 970.0, 969.99, 500.0, 0.0])
    np.testing.assert_array_equal(gamma_at(config, given), np.float32([1.2, 1.2, 1, 1, 1]))
    np.testing.assert_array_equal(active(config, given), [True, True, False, False, False])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_end_at_gamma_and_begin_at_the_threshold(schedule):
    config = TacaConfig(gamma=1.5, threshold=900, schedule=schedule)
    full, at_threshold, below = gamma_at(config, jnp.array([1000.0, 900.0, 899.0]))
    assert full == pytest.approx(1.5, abs=1e-6)
    assert at_threshold == pytest.approx(1.5 if schedule == "step" else 1.0, abs=1e-6)
    assert below == 1


@pytest.mark.parametrize(
    ("schedule", "quarter"),
    [("linear", 0.25), ("cosine", 0.146447), ("sigmoid", 0.070108)],
)
def test_smooth_schedules_have_their_shapes(schedule, quarter):
    """At a quarter of the way; each is point-symmetric, so half of gamma's rise is halfway."""
    config = TacaConfig(gamma=2.0, threshold=900, schedule=schedule)
    values = gamma_at(config, jnp.array([925.0, 950.0, 975.0])) - 1
    np.testing.assert_allclose(values, [quarter, 0.5, 1 - quarter], atol=1e-5)


@given(configs, timesteps)
def test_gamma_is_between_one_and_its_fullest(config, timestep):
    gamma = np.asarray(gamma_at(config, jnp.array(timestep)))
    low, high = sorted((1.0, config.gamma))
    assert np.all((low - 1e-6 <= gamma) & (gamma <= high + 1e-6))
    assert gamma.dtype == np.float32
    assert gamma.shape == (len(timestep),)


@given(configs, timesteps)
def test_gamma_moves_one_way_in_time(config, timestep):
    gamma = np.asarray(gamma_at(config, jnp.array(sorted(timestep))))
    assert np.all(np.diff(gamma) * np.sign(config.gamma - 1) >= -1e-6)


@given(configs, timesteps)
def test_gamma_is_exactly_one_where_taca_is_not_active(config, timestep):
    inactive = ~np.asarray(active(config, jnp.array(timestep)))
    assert np.all(np.asarray(gamma_at(config, jnp.array(timestep)))[inactive] == 1)


@given(st.integers(0, 5), st.integers(0, 8), timesteps)
def test_first_steps_count_steps_whatever_the_timestep(first_steps, step, timestep):
    config = TacaConfig(gamma=1.3, schedule="linear", first_steps=first_steps)
    on = step < first_steps
    expected = np.full(len(timestep), 1.3 if on else 1.0, np.float32)
    np.testing.assert_array_equal(gamma_at(config, jnp.array(timestep), step), expected)
    np.testing.assert_array_equal(
        active(config, jnp.array(timestep), step), np.full(len(timestep), on)
    )


def test_steps_may_differ_by_sample():
    config = TacaConfig(first_steps=3)
    on = active(config, jnp.full(4, 100.0), jnp.array([0, 2, 3, 9]))
    np.testing.assert_array_equal(on, [True, True, False, False])


def test_first_steps_do_not_decide_in_training():
    """Without a step the threshold decides."""
    config = TacaConfig(first_steps=3)
    np.testing.assert_array_equal(active(config, jnp.array([990.0, 10.0])), [True, False])


def test_without_first_steps_the_step_is_ignored():
    np.testing.assert_array_equal(
        active(TacaConfig(), jnp.array([990.0, 10.0]), jnp.int32(0)), [True, False]
    )


def test_time_and_step_may_be_traced():
    config = TacaConfig(gamma=1.4, threshold=800, schedule="cosine", first_steps=2)
    time = jnp.linspace(0, 1000, 11)
    for step in (None, jnp.int32(1)):
        np.testing.assert_allclose(
            jax.jit(lambda t, s: gamma_at(config, t, s))(time, step),
            gamma_at(config, time, step),
            rtol=1e-6,
        )
    compiled = jax.jit(lambda t, s: active(config, t, s))
    assert compiled(time, 0).all()
    assert not compiled(time, 7).any()
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_threshold_of_1000_leaves_only_pure_noise(schedule):
    gamma = gamma_at(TacaConfig(threshold=1000, schedule=schedule), jnp.array([1000.0, 999.9]))
    assert np.isfinite(gamma).all()
    assert gamma[1] == 1


def test_knots_are_joined_by_straight_lines_and_replace_gamma_and_schedule():
    config = TacaConfig(gamma=9, threshold=800, schedule="cosine", knots=(1.1, 1.5, 0.9))
    times = jnp.array([799.0, 800.0, 850.0, 900.0, 975.0, 1000.0])
    expected = np.float32([1, 1.1, 1.3, 1.5, 1.05, 0.9])
    np.testing.assert_allclose(gamma_at(config, times), expected, rtol=1e-6)
    line = describe_steps(config, [1000, 900, 700])
    assert line == "TACA acts on steps 1 to 2 of 3 (t >= 800), gamma 0.9 to 1.5 (3 knots)"
    assert describe_gamma(config) == "gamma by 3 knots"
    assert describe_gamma(TacaConfig(schedule="linear")) == "gamma up to 1.2 (linear)"


def test_a_scalar_timestep_gives_a_scalar():
    assert gamma_at(TacaConfig(), 990.0).shape == ()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 0.0}, r"taca\.gamma is 0\.0"),
        ({"gamma": -1.2}, r"taca\.gamma is -1\.2"),
        ({"gamma": float("nan")}, r"taca\.gamma is nan"),
        ({"gamma": float("inf")}, r"taca\.gamma is inf"),
        ({"threshold": -1.0}, r"taca\.threshold is -1\.0"),
        ({"threshold": 1000.5}, r"taca\.threshold is 1000\.5"),
        ({"threshold": 0.97}, r"threshold is 0\.97; timesteps .* to 1000: did you mean 970\?"),
        ({"threshold": 1.0}, r"threshold is 1\.0; .* did you mean 1000\?"),
        ({"first_steps": -1}, r"taca\.first_steps is -1"),
        ({"knots": (1.2,)}, r"taca\.knots is \(1\.2,\); it must be two or more"),
        ({"knots": (1.2, -1.0)}, r"taca\.knots is 1\.2,-1\.0; it must be positive"),
        ({"knots": (1.2, 1.0), "first_steps": 3}, r"without first_steps"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        TacaConfig(**wrong)


def test_a_threshold_of_0_acts_always():
    assert active(TacaConfig(threshold=0), jnp.array([1000.0, 0.5, 0.0])).all()


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (TacaConfig(), "steps 1 to 3 of 6 (t >= 970)"),
        (TacaConfig(threshold=1000), "step 1 of 6 (t >= 1000)"),
        (TacaConfig(threshold=0), "steps 1 to 6 of 6 (t >= 0)"),
        (TacaConfig(first_steps=2), "steps 1 to 2 of 6 (first_steps=2)"),
        (TacaConfig(first_steps=0), "none of 6 steps (first_steps=0)"),
        (
            TacaConfig(gamma=2, threshold=900, schedule="linear"),
            "steps 1 to 4 of 6 (t >= 900), gamma 1.1 to 2 (linear)",
        ),
    ],
)
def test_the_steps_on_which_taca_acts_are_said_in_words(config, line):
    timesteps = [1000.0, 990.0, 970.0, 910.0, 500.0, 100.0]
    assert describe_steps(config, timesteps) == f"TACA acts on {line}"


def test_timesteps_in_any_order_are_described_too():
    given = np.array([500.0, 980.0, 990.0, 100.0, 975.0])
    assert describe_steps(TacaConfig(), given) == "TACA acts on steps 2 to 3, 5 of 5 (t >= 970)"
    assert describe_steps(TacaConfig(), [900.0]) == "TACA acts on none of 1 steps (t >= 970)"
