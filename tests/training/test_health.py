"""Which losses end a run, and what is said then."""

import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.training.health import Health, Step


def step(number, loss, norm=1.0):
    metrics = {"loss": np.float32(loss), "gradient_norm": np.float32(norm)}
    return Step(number, metrics, [f"{number}.png", "other.png"])


@pytest.mark.parametrize(
    ("loss", "norm", "message"),
    [
        (np.nan, 1.0, "the loss is nan at step 1, on the samples 1.png, other.png; start another"),
        (np.inf, 1.0, "the loss is inf at step 1, on the samples "),
        (1.0, np.inf, "the gradient norm is inf at step 1, on the samples "),
    ],
)
def test_what_is_no_number_names_its_samples(loss, norm, message):
    with pytest.raises(UserError, match=message) as refusal:
        Health().check(step(1, loss, norm))
    assert "\n" not in str(refusal.value)


def test_a_loss_that_runs_away_is_refused_though_it_does_so_slowly():
    health = Health()

    def rise():
        for number in range(1, 200):
            health.check(step(number, 2 * 1.05**number))

    with pytest.raises(UserError, match=r"the loss is [\d.]+, 10\d times the usual at step \d+, "):
        rise()


def test_losses_of_single_samples_may_differ():
    health, rng = Health(), np.random.default_rng(0)
    for number in range(1, 2000):
        health.check(step(number, 2 * rng.uniform(0.03, 1)))


def test_a_step_counts_once():
    health = Health()
    for number in range(1, 11):
        health.check(step(number, 1.0))
    health.check(step(10, np.nan))  # has been looked at
    with pytest.raises(UserError):
        health.check(step(11, 101.0))
