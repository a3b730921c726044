"""Heun and DPM++ 2M against diffusers' schedulers, their order, and TACA at each evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.lora import AttachedLoRA
from taca_jax.sampling.loop import SkipLayers, denoise, make_plan
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.sampling.solvers import evaluation_count
from taca_jax.taca import TacaConfig

SHAPE = (2, 4, 4, 3)
TEXT = Conditioning(jnp.zeros((2, 1, 4)), jnp.zeros((2, 4)))
OURS = FlowSchedule(shift=3.0)


def field(x, sigma, tanh):
    """A velocity that bends with the place and the time."""
    return tanh(2 * x) * (0.3 + sigma) - 0.5 * x * sigma


class Field(nnx.Module):
    def __call__(self, latents, timestep, txt, pooled, *, gamma, lora_scale, guidance=None):
        return field(latents, timestep[:, None, None, None] / 1000, jnp.tanh)


class Turns(nnx.Module):
    """dx/dsigma = x cos(3 sigma), which is solved in closed form."""

    def __call__(self, latents, timestep, txt, pooled, *, gamma, lora_scale, guidance=None):
        return latents * jnp.cos(3 * timestep[:, None, None, None] / 1000)


def start() -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(0), SHAPE))


def run(sampler, sigmas, model, **options):
    return denoise(model, start(), make_plan(sigmas, None, sampler=sampler), TEXT, **options)


def theirs(sampler, sigmas) -> np.ndarray:
    """[steps, ...]: diffusers' latents after each step."""
    torch = pytest.importorskip("torch")
    schedulers = pytest.importorskip("diffusers.schedulers")
    steps, heun = len(sigmas) - 1, sampler == "heun"
    if heun:
        scheduler = schedulers.FlowMatchHeunDiscreteScheduler()
        levels = np.concatenate([sigmas[:1], sigmas[1:-1].repeat(2), sigmas[-1:]])
    else:
        scheduler = schedulers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            solver_order=2,
            algorithm_type="dpmsolver++",
        )
        levels = sigmas
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor(levels)
    scheduler.set_begin_index(0)
    if heun:  # each evaluation's level; the scheduler's own list has those of its steps
        levels = np.concatenate([sigmas[:1], sigmas[1:-1].repeat(2)])
    x, seen = torch.tensor(start()), []
    for i, sigma in enumerate(levels[: 2 * steps - 1 if heun else steps]):
        v = field(x, float(sigma), torch.tanh)
        x = scheduler.step(v, torch.tensor(float(1000 * sigma)), x, return_dict=False)[0]
        if not heun or i % 2 == 1 or i == 2 * steps - 2:
            seen.append(x.numpy())
    return np.stack(seen)


SCHEDULES = {
    "ours, 1 step": OURS.sigmas(1, 64),
    "ours, 2 steps": OURS.sigmas(2, 64),
    "ours, 8 steps": OURS.sigmas(8, 64),
    "ours, 20 steps": FlowSchedule().sigmas(20, 4096),
    "ours, from the middle": OURS.sigmas(12, 64)[5:],
    "diffusers' of DPM++": np.append(np.linspace(0.999, 0, 11)[:-1], 0).astype(np.float32),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["heun", "dpm++2m"])
def test_each_step_is_diffusers(sampler, name):
    sigmas = SCHEDULES[name]
    expected = theirs(sampler, sigmas)
    end, seen = run(sampler, sigmas, Field(), trajectory=True)
    assert seen.latents.shape == expected.shape
    np.testing.assert_allclose(seen.latents, expected, atol=1e-5)
    assert np.array_equal(end, seen.latents[-1])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++2m"])
def test_the_error_falls_with_the_order(sampler):
    exact = start() * np.exp((np.sin(3 * 0.1) - np.sin(3 * 0.9)) / 3)

    def error(steps):
        sigmas = np.linspace(0.9, 0.1, steps + 1).astype(np.float32)
        return np.abs(np.asarray(run(sampler, sigmas, Turns())[0]) - exact).max()

    rate = np.log2(error(8) / error(16))
    if sampler == "euler":
        assert 0.7 < rate < 1.4
    else:
        assert rate > 1.7


def test_heun_is_told_the_state_of_both_evaluations():
    sigmas = np.array([1.0, 0.9, 0.5, 0.0], np.float32)
    loras = [AttachedLoRA("own", 1.0, "taca")]
    skip = SkipLayers((0,), scale=2.0, start=0.2, stop=0.6)  # step 1 alone
    plan = make_plan(sigmas, TacaConfig(1.5, 850), loras=loras, skip=skip, sampler="heun")
    np.testing.assert_array_equal(plan.step, [0, 0, 1, 1, 2])
    np.testing.assert_allclose(plan.sigma, [1, 0.9, 0.9, 0.5, 0.5])
    np.testing.assert_allclose(plan.gamma, [1.5, 1.5, 1.5, 1, 1])  # by timestep
    np.testing.assert_allclose(plan.lora_scale[:, 0], [1, 1, 1, 0, 0])
    np.testing.assert_allclose(plan.skip_scale, [0, 0, 2, 2, 0])
    first = make_plan(sigmas, TacaConfig(1.5, first_steps=2), loras=loras, sampler="heun")
    np.testing.assert_allclose(first.gamma, [1.5, 1.5, 1.5, 1.5, 1])  # by step
    assert [evaluation_count(each, 30) for each in ("euler", "heun", "dpm++2m")] == [30, 59, 30]


@pytest.mark.parametrize("sampler", ["heun", "dpm++2m"])
def test_a_watched_run_is_the_same_to_the_bit(sampler):
    sigmas, seen = OURS.sigmas(5, 64), []
    whole, _ = run(sampler, sigmas, Field())
    end, _ = run(sampler, sigmas, Field(), watch=lambda i, now: seen.append((i, now.latents)))
    assert np.array_equal(end, whole)
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert np.array_equal(seen[-1][1], whole)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(UserError, match="sampler is 'ddim'; it must be one of euler, heun, dpm"):
        make_plan(OURS.sigmas(2, 64), None, sampler="ddim")
