"""The schedule against diffusers', the plan of TACA and LoRA, and the Euler loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import AttachedLoRA, LoRAConfig, add_lora
from taca_jax.sampling import loop
from taca_jax.sampling.loop import denoise, make_plan
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.taca import TacaConfig
from tests.random_models import random_model, randomise
from tests.training.tiny import FLUX

SIGMAS = FlowSchedule(shift=3.0).sigmas(6, 100)
BATCH = 2


def diffusers_sigmas(steps, tokens, shift):
    scheduling = pytest.importorskip("diffusers.schedulers")
    dynamic = shift is None
    scheduler = scheduling.FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dynamic else shift, use_dynamic_shifting=dynamic
    )
    # Its FLUX pipeline's calculate_shift, which takes 15 s to import.
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256) if dynamic else None
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert np.allclose(scheduler.timesteps.numpy(), 1000 * scheduler.sigmas.numpy()[:-1])
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize("shift", [None, 1.0, 3.0])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 9216])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_noise_levels_are_diffusers(steps, tokens, shift):
    sigmas = FlowSchedule(shift=shift).sigmas(steps, tokens)
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, diffusers_sigmas(steps, tokens, shift), atol=2e-7)


def test_noise_levels_fall_from_1_to_0():
    sigmas = FlowSchedule().sigmas(30, 4096)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()
    more = FlowSchedule().sigmas(30, 8192)
    assert (more[1:-1] > sigmas[1:-1]).all()  # larger pictures are given more noise


def test_a_run_has_at_least_one_step():
    with pytest.raises(UserError, match="steps is 0; sampling takes 1 or more"):
        FlowSchedule().sigmas(0, 256)


def with_taca(strength: float = 1.0) -> AttachedLoRA:
    return AttachedLoRA("own", strength, "taca")


def test_a_plain_plan_has_no_gamma_and_no_lora():
    plan = make_plan(SIGMAS, None, loras=[with_taca(2.0)])
    assert np.array_equal(plan.sigma, SIGMAS[:-1])
    assert np.array_equal(plan.move, np.diff(SIGMAS))
    for gamma in (plan.gamma, plan.negative_gamma):
        assert np.array_equal(gamma, np.ones(6))
    assert not np.any(plan.lora_scale)
    assert not np.any(plan.negative_lora_scale)


def test_the_plan_acts_above_the_threshold():
    timestep = 1000 * SIGMAS[:-1]
    plan = make_plan(SIGMAS, TacaConfig(gamma=1.5, threshold=850), loras=[with_taca(0.5)])
    acts = timestep >= 850
    assert 0 < acts.sum() < 6
    np.testing.assert_allclose(plan.gamma, np.where(acts, 1.5, 1.0))
    np.testing.assert_allclose(plan.lora_scale[:, 0], np.where(acts, 0.5, 0.0))
    assert np.array_equal(plan.negative_gamma, plan.gamma)
    assert np.array_equal(plan.negative_lora_scale, plan.lora_scale)


@pytest.mark.parametrize("first", [0, 1, 3, 10])
def test_the_plan_acts_on_the_first_steps(first):
    taca = TacaConfig(threshold=0, schedule="linear", first_steps=first)
    plan = make_plan(SIGMAS, taca, loras=[with_taca()])
    acts = np.arange(6) < first
    np.testing.assert_allclose(plan.gamma, np.where(acts, 1.2, 1.0), rtol=1e-6)
    np.testing.assert_allclose(plan.lora_scale[:, 0], acts)


def test_a_smooth_schedule_falls_while_the_lora_stays_on():
    plan = make_plan(SIGMAS, TacaConfig(threshold=600, schedule="cosine"), loras=[with_taca()])
    acts = SIGMAS[:-1] >= 0.6
    assert (np.diff(plan.gamma) <= 0).all()
    assert plan.gamma[0] == np.float32(1.2)
    assert np.array_equal(plan.lora_scale[:, 0], acts)


def test_cond_only_leaves_the_negative_prompt_plain():
    style = AttachedLoRA("style", 0.8, "always")
    plan = make_plan(SIGMAS, TacaConfig(threshold=0, cond_only=True), loras=[style, with_taca()])
    assert (np.asarray(plan.gamma) == np.float32(1.2)).all()
    assert np.array_equal(plan.negative_gamma, np.ones(6))
    np.testing.assert_allclose(plan.lora_scale, [[0.8, 1.0]] * 6)
    np.testing.assert_allclose(plan.negative_lora_scale, [[0.8, 0.0]] * 6)


def test_a_lora_that_is_always_on_acts_at_every_step():
    loras = [with_taca(), AttachedLoRA("style", 0.8, "always")]
    plan = make_plan(SIGMAS, TacaConfig(threshold=850), loras=loras)
    assert np.array_equal(plan.lora_scale[:, 0], SIGMAS[:-1] >= 0.85)
    np.testing.assert_allclose(plan.lora_scale[:, 1], np.full(6, 0.8))
    plain = make_plan(SIGMAS, None, loras=loras)
    np.testing.assert_allclose(plain.lora_scale, [[0.0, 0.8]] * 6)
    assert np.array_equal(plain.negative_lora_scale, plain.lora_scale)


class Constant(nnx.Module):
    """A velocity that is what it was made with."""

    def __init__(self, velocity):
        self.velocity = nnx.Param(velocity)

    def __call__(self, latents, timestep, txt, pooled, *, gamma, lora_scale, guidance=None):
        return jnp.broadcast_to(self.velocity[...], latents.shape)


class Records(nnx.Module):
    """A velocity that tells what the model was called with: (time, gamma, lora_scale, text)."""

    def __call__(self, latents, timestep, txt, pooled, *, gamma, lora_scale, guidance=None):
        seen = jnp.stack([timestep, gamma, lora_scale[:, 0], txt[:, 0, 0]], axis=-1)
        return jnp.broadcast_to(seen[:, None, None, :], latents.shape)


def text(batch=BATCH, value=0.0):
    return Conditioning(jnp.full((batch, 3, 32), value), jnp.zeros((batch, 32)))


def test_a_constant_velocity_is_integrated_exactly():
    start, target = jax.random.normal(jax.random.key(0), (2, BATCH, 8, 8, 3))
    for steps in (1, 7):
        plan = make_plan(FlowSchedule().sigmas(steps, 256), None)
        end, seen = denoise(Constant(start - target), start, plan, text(), trajectory=True)
        np.testing.assert_allclose(end, target, atol=1e-5)
        for x0 in seen.x0:
            np.testing.assert_allclose(x0, target, atol=1e-5)


def test_the_model_is_told_each_steps_state():
    plan = make_plan(SIGMAS, TacaConfig(gamma=1.5, threshold=850), loras=[with_taca(0.5)])
    start = jnp.zeros((BATCH, 4, 4, 4))
    _, seen = denoise(Records(), start, plan, text(), trajectory=True)
    latents = np.concatenate([start[None], seen.latents])
    velocity = np.diff(latents, axis=0) / np.diff(SIGMAS)[:, None, None, None, None]
    for column, values in enumerate([1000 * plan.sigma, plan.gamma, plan.lora_scale[:, 0]]):
        np.testing.assert_allclose(velocity[:, 0, 0, 0, column], values, rtol=1e-3, atol=1e-3)


def test_it_runs_within_another_program_whose_compiler_options_hold(monkeypatch):
    """JAX refuses options of a program within a program, whichever of its arrays are traced."""
    monkeypatch.setattr(loop, "step_options", lambda: {"xla_cpu_enable_fast_min_max": True})
    plan = make_plan(SIGMAS, TacaConfig(), loras=[with_taca()])
    start = jnp.zeros((BATCH, 4, 4, 4))

    def end(start):
        return denoise(Records(), start, plan, text())[0]

    alone = end(start)
    for inside in (jax.jit(end)(start), jax.jit(lambda: end(start))()):
        np.testing.assert_allclose(inside, alone, rtol=1e-6)


def test_guidance_runs_both_prompts_each_with_its_state():
    taca = TacaConfig(threshold=0, cond_only=True)
    plan = make_plan(SIGMAS[:1].repeat(2) * [1, 0], taca, loras=[with_taca()])
    start = jnp.zeros((BATCH, 4, 4, 4))
    end, _ = denoise(Records(), start, plan, text(value=5.0), text(value=1.0), jnp.float32(3.0))
    # v = low + 3 (high - low); one step from 1 to 0 gives -v.
    expected = [1000, 1 + 3 * 0.2, 3, 1 + 3 * 4]
    np.testing.assert_allclose(-end[0, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(end[1], end[0])


@pytest.fixture(scope="module")
def model():
    model = random_model(FLUX)
    add_lora(model, LoRAConfig(rank=2, alpha=2), ATTENTION_TARGETS, rngs=nnx.Rngs(1))
    randomise(model, LoRAParam, scale=0.2)
    return model


@pytest.fixture(scope="module")
def prompt():
    keys = jax.random.split(jax.random.key(5))
    return Conditioning(
        jax.random.normal(keys[0], (BATCH, 3, 32)), jax.random.normal(keys[1], (BATCH, 32))
    )


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(6), (BATCH, 8, 8, 3))


def test_guidance_of_1_is_no_guidance(model, prompt, noise):
    plan = make_plan(SIGMAS, TacaConfig(threshold=850), loras=[with_taca()])
    plain, _ = denoise(model, noise, plan, prompt)
    guided, _ = denoise(model, noise, plan, prompt, text(), jnp.float32(1.0))
    np.testing.assert_allclose(guided, plain, atol=2e-5)
    stronger, _ = denoise(model, noise, plan, prompt, text(), jnp.float32(3.0))
    assert not np.allclose(stronger, plain, atol=1e-2)


def test_a_trajectory_ends_in_the_latents_and_predicts_x0(model, prompt, noise):
    plan = make_plan(SIGMAS, TacaConfig(threshold=850), loras=[with_taca()])
    end, seen = denoise(model, noise, plan, prompt, trajectory=True)
    without, nothing = denoise(model, noise, plan, prompt)
    assert nothing is None
    np.testing.assert_allclose(without, end, atol=1e-5)
    assert seen.latents.shape == seen.x0.shape == (6, BATCH, 8, 8, 3)
    assert np.array_equal(seen.latents[-1], end)
    before = np.concatenate([noise[None], seen.latents[:-1]])
    sigma, after = (s.reshape(-1, 1, 1, 1, 1) for s in (SIGMAS[:-1], SIGMAS[1:]))
    velocity = (np.asarray(seen.latents) - before) / (after - sigma)
    np.testing.assert_allclose(seen.x0, before - sigma * velocity, atol=1e-4)
    np.testing.assert_allclose(seen.x0[-1], end, atol=1e-5)  # the last step goes to sigma = 0


def test_one_program_serves_every_taca_and_lora(prompt, noise):
    """Counted by the calls that tracing makes of the model."""
    calls = []

    class Counted(Records):
        def __call__(self, latents, timestep, txt, pooled, **inputs):
            calls.append(latents.shape)
            return super().__call__(latents, timestep, txt, pooled, **inputs)

    wide = jnp.concatenate([noise, noise[..., :1]], axis=-1)
    model = Counted()
    denoise(model, wide, make_plan(SIGMAS, None, loras=[with_taca()]), prompt)
    traced = len(calls)
    assert traced >= 1
    for taca in (
        None,
        TacaConfig(),
        TacaConfig(gamma=1.5, threshold=500),
        TacaConfig(schedule="cosine"),
        TacaConfig(first_steps=3),
        TacaConfig(cond_only=True),
    ):
        for strength in (0.0, 1.0, 0.5):
            denoise(model, wide, make_plan(SIGMAS, taca, loras=[with_taca(strength)]), prompt)
    other = FlowSchedule(shift=1.0).sigmas(6, 64)
    denoise(model, wide, make_plan(other, None, loras=[with_taca()]), prompt)
    assert len(calls) == traced
    denoise(model, wide, make_plan(FlowSchedule().sigmas(5, 64), None, loras=[with_taca()]), prompt)
    assert len(calls) > traced  # another number of steps is another program


def test_an_inactive_taca_with_a_lora_is_the_base(model, prompt, noise):
    plain, _ = denoise(model, noise, make_plan(SIGMAS, None, loras=[with_taca()]), prompt)
    off = TacaConfig(first_steps=0)
    inactive, _ = denoise(model, noise, make_plan(SIGMAS, off, loras=[with_taca()]), prompt)
    assert np.array_equal(plain, inactive)
    graph, lora, rest = nnx.split(model, LoRAParam, ...)
    base = nnx.merge(graph, jax.tree.map(jnp.zeros_like, lora), rest)
    without, _ = denoise(base, noise, make_plan(SIGMAS, None, loras=[with_taca()]), prompt)
    assert np.array_equal(plain, without)
    acting, _ = denoise(
        model, noise, make_plan(SIGMAS, TacaConfig(gamma=1.0), loras=[with_taca()]), prompt
    )
    assert not np.allclose(acting, plain, atol=1e-3)


def test_low_precision_latents_become_float32(model, prompt, noise):
    end, _ = denoise(
        model, noise.astype(jnp.bfloat16), make_plan(SIGMAS, None, loras=[with_taca()]), prompt
    )
    assert end.dtype == jnp.float32


def test_a_watched_run_is_the_same_to_the_bit(model, prompt, noise):
    plan = make_plan(SIGMAS, TacaConfig(threshold=850), loras=[with_taca()])
    whole, _ = denoise(model, noise, plan, prompt)
    seen = []
    end, _ = denoise(
        model, noise, plan, prompt, watch=lambda *step: seen.append(jax.device_get(step))
    )
    assert np.array_equal(end, whole)
    assert [step for step, _ in seen] == list(range(6))
    _, steps = denoise(model, noise, plan, prompt, trajectory=True)
    for (_, now), latents, x0 in zip(seen, steps.latents, steps.x0, strict=True):
        np.testing.assert_allclose(now.latents, latents, atol=1e-5)
        np.testing.assert_allclose(now.x0, x0, atol=1e-5)
