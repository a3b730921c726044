"""From noise to latents: the loop of flow matching, with TACA's state as traced values.

Everything that changes (time, gamma, the LoRAs' strengths, the solver's coefficients) is an array
over the evaluations of the model, so that one compiled loop serves plain sampling, every TACA
schedule, all LoRA strengths and all solvers.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

from taca_jax.errors import UserError
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.fusion import step_options
from taca_jax.nn.layers import LoRAScale
from taca_jax.nn.lora import AttachedLoRA
from taca_jax.sampling.solvers import Sampler, evaluations
from taca_jax.taca import MAX_TIMESTEP, TacaConfig, active, gamma_at

_LOG = logging.getLogger(__name__)
MAX_SEED = 2**31 - 1 - 2**16
"""The largest seed; picture i uses seed + i, which must fit int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """The values of each evaluation of the model; float32 arrays `[n]` but `step`, of several LoRAs
    `[n, loras]`.

    step: the sampling step that an evaluation belongs to; Euler's steps have one each. sigma: noise
    level. move, correct, memory_x, memory_v: the solver's coefficients (`solvers`). gamma: TACA's
    temperature. lora_scale: strength of each attached LoRA. negative_gamma, negative_lora_scale:
    the same for the negative prompt of classifier-free guidance. skip_scale: strength of skip-layer
    guidance.
    """

    step: Int[Array, " n"]
    sigma: Float[Array, " n"]
    move: Float[Array, " n"]
    correct: Float[Array, " n"]
    memory_x: Float[Array, " n"]
    memory_v: Float[Array, " n"]
    gamma: Float[Array, " n"]
    negative_gamma: Float[Array, " n"]
    lora_scale: Float[Array, "n loras"]
    negative_lora_scale: Float[Array, "n loras"]
    skip_scale: Float[Array, " n"]


@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance, of Stable Diffusion 3.5-Medium: away from the model without some layers.

    layers: to leave out. scale: the guidance's strength. start, stop: it acts at steps i of n with
    start * n < i < stop * n. Source: diffusers' `StableDiffusion3Pipeline`.

    Raises UserError for no layers, and for a range that is not within 0 and 1.
    """

    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self):
        if not self.layers:
            raise UserError("skip_layers is empty; give layers such as (7, 8, 9), or None")
        if not 0 <= self.start <= self.stop <= 1:
            raise UserError(
                f"skip-layer guidance acts from {self.start} to {self.stop}; expected a range "
                "within 0 and 1"
            )

    def scales(self, steps: int) -> Float[Array, " n"]:
        """The strength at each step, float32."""
        step = np.arange(steps)
        on = (step > self.start * steps) & (step < self.stop * steps)
        return jnp.asarray(self.scale * on, jnp.float32)

    def announce(self, steps: int) -> None:
        """Logs a warning if none of a run's `steps` is between start and stop."""
        if self.scale and not np.any(self.scales(steps)):
            _LOG.warning(
                "warning: skip_layers acts at steps i of n with %g n < i < %g n, which is none "
                "of %d: it does nothing here",
                *(self.start, self.stop, steps),
            )

    def mask(self, num_layers: int) -> Bool[Array, " layers"]:
        """Which layers to leave out. Raises UserError for layers that the model does not have."""
        beyond = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if beyond:
            raise UserError(
                f"skip_layers has {beyond}; this model's layers are 0..{num_layers - 1}"
            )
        return jnp.asarray(np.isin(np.arange(num_layers), self.layers))


def make_plan(
    sigmas: np.ndarray,
    taca: TacaConfig | None,
    *,
    loras: Sequence[AttachedLoRA] = (),
    skip: SkipLayers | None = None,
    sampler: Sampler = "euler",
) -> Plan:
    """The plan of a run over `sigmas` with TACA, or with plain attention if `taca` is None.

    TACA acts by the timestep of each evaluation: of the two in a step of Heun's, which are made at
    both ends of the step, the second one may be below the threshold. `first_steps` counts steps,
    not evaluations.

    Each of the attached `loras` is on at its strength: always, or if its gate is `taca` exactly
    while TACA is (with `cond_only` not for the negative prompt). For such a LoRA alone set gamma to
    1, for TACA alone set its strength to 0. `skip` adds skip-layer guidance. Raises UserError for a
    sampler that there is not.
    """
    made = evaluations(sampler, sigmas)
    timestep, step = jnp.asarray(made.sigma) * MAX_TIMESTEP, jnp.asarray(made.step)
    plain = jnp.ones_like(timestep)
    gamma = plain if taca is None else gamma_at(taca, timestep, step)
    off = jnp.zeros_like(timestep)
    on = off if taca is None else active(taca, timestep, step).astype(jnp.float32)
    cond_only = taca is not None and taca.cond_only
    return Plan(
        **{name: jnp.asarray(values) for name, values in vars(made).items()},
        gamma=gamma,
        negative_gamma=plain if cond_only else gamma,
        lora_scale=_scales(loras, on),
        negative_lora_scale=_scales(loras, off if cond_only else on),
        skip_scale=off if skip is None else skip.scales(len(sigmas) - 1)[step],
    )


def _scales(
    loras: Sequence[AttachedLoRA], with_taca: Float[Array, " n"]
) -> Float[Array, "n loras"]:
    """The strength of each LoRA at each step; `with_taca` is 1 while TACA acts, else 0."""
    gates = {"always": jnp.ones_like(with_taca), "taca": with_taca}
    columns = [gates[lora.gate] * jnp.float32(lora.strength) for lora in loras]
    return jnp.stack(columns, axis=1) if columns else jnp.zeros((len(with_taca), 0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """The latents after each step, and the x0 predicted last in it, `[steps, b, H, W, c]`."""

    latents: Float[Array, "n b H W c"]
    x0: Float[Array, "n b H W c"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The state of a run: latents, the x0 predicted last, and the trajectory if it is recorded."""

    latents: Float[Array, "b H W c"]
    x0: Float[Array, "b H W c"]
    trajectory: Trajectory | None


State = tuple[Sampled, Float[Array, "b H W c"]]
"""Between evaluations: the run's state, and what the solver remembers."""


def denoise(
    transformer: nnx.Module,
    latents: Float[Array, "b H W c"],
    plan: Plan,
    positive: Conditioning,
    negative: Conditioning | None = None,
    cfg_scale: float = 1.0,
    *,
    skip: Bool[Array, " layers"] | None = None,
    trajectory: bool = False,
    watch: Callable[[int, Sampled], None] | None = None,
) -> tuple[Float[Array, "b H W c"], Trajectory | None]:
    """The steps of `plan` from noise to latents, compiled as one program.

    `negative` turns classifier-free guidance on: v = v_negative + cfg_scale (v - v_negative), both
    in one batch. `skip` adds skip_scale (v - v without those layers) where the plan's skip_scale
    is not 0. Latents stay float32.

    `watch(step, now)` is called after each step; the arrays may not be computed yet. The same
    compiled program then runs step by step, so that watching does not change the result by a bit.
    """
    graph, state = nnx.split(transformer)
    x = jnp.asarray(latents, jnp.float32)
    seen = None
    if trajectory:
        empty = jnp.zeros((int(plan.step[-1]) + 1, *x.shape), jnp.float32)
        seen = Trajectory(latents=empty, x0=empty)
    now: State = (Sampled(latents=x, x0=x, trajectory=seen), jnp.zeros_like(x))
    # Within a program that is being compiled, that one's options hold.
    given = (state, plan, positive, negative, cfg_scale, skip)
    inner = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((given, now)))
    run = partial(_compiled(*({} if inner else step_options()).items()), graph, *given)
    if watch is None:
        now = run(now, 0, len(plan.sigma))
    else:
        now = _beside(state, now)
        steps, starts = np.unique(np.asarray(plan.step), return_index=True)
        for i, start, stop in zip(steps, starts, [*starts[1:], len(plan.sigma)], strict=True):
            now = run(now, int(start), int(stop))
            watch(int(i), now[0])
    return now[0].latents, now[0].trajectory


def _beside(state: nnx.State, now: State) -> State:
    """`now` committed to the device of the parameters, if any of them is: what a step
    returns is, and the second step would else be compiled anew."""
    leaves = jax.tree.leaves(state)
    places = {leaf.sharding for leaf in leaves}
    place = places.pop() if len(places) == 1 else None
    if isinstance(place, SingleDeviceSharding) and any(leaf.committed for leaf in leaves):
        return jax.device_put(now, place)
    return now


@cache
def _compiled(*options: tuple[str, str]) -> Callable[..., State]:
    """`_denoise` with those options of the compiler."""
    return jax.jit(_denoise, static_argnames=("graph",), compiler_options=dict(options))


def _denoise(
    graph: nnx.GraphDef,
    state: nnx.State,
    plan: Plan,
    positive: Conditioning,
    negative: Conditioning | None,
    cfg_scale: Float[Array, ""],
    skip: Bool[Array, " layers"] | None,
    now: State,
    start: Int[Array, ""],
    stop: Int[Array, ""],
) -> State:
    """The evaluations from `start` to before `stop`, which are traced, so that this is compiled
    once."""
    model = nnx.merge(graph, state)
    velocity = guided_velocity(model, positive, negative, cfg_scale, skip)

    def evaluate(i: jax.Array, before: State) -> State:
        level = jax.tree.map(lambda values: values[i], plan)
        (now, remembered), step = before, level.step
        v = velocity(now.latents, level)
        memory = level.memory_x * now.latents + level.memory_v * v
        after = now.latents + level.move * v + level.correct * (memory - remembered)
        x0 = now.latents - level.sigma * v
        seen = now.trajectory
        if seen is not None:
            seen = Trajectory(latents=seen.latents.at[step].set(after), x0=seen.x0.at[step].set(x0))
        return Sampled(latents=after, x0=x0, trajectory=seen), memory

    return jax.lax.fori_loop(start, stop, evaluate, now)


def guided_velocity(
    model: Callable[..., jax.Array],
    positive: Conditioning,
    negative: Conditioning | None,
    cfg_scale: Float[Array, ""],
    skip: Bool[Array, " layers"] | None = None,
) -> Callable[[jax.Array, Plan], jax.Array]:
    """The function (latents, one evaluation of the plan) -> velocity, guided if there is
    `negative`."""

    def call(
        x: jax.Array,
        text: Conditioning,
        now: Plan,
        gamma: Float[Array, " b"],
        lora_scale: LoRAScale,
        **options: jax.Array,
    ) -> Float[Array, "b H W c"]:
        if text.guidance is not None:
            options["guidance"] = text.guidance
        return model(
            x,
            jnp.full(x.shape[0], now.sigma * MAX_TIMESTEP),
            text.txt,
            text.pooled,
            gamma=gamma,
            lora_scale=lora_scale,
            **options,
        )

    def plain(x: jax.Array, now: Plan, **options: jax.Array) -> jax.Array:
        gamma, lora_scale = (
            jnp.repeat(v[None], len(x), axis=0) for v in (now.gamma, now.lora_scale)
        )
        return call(x, positive, now, gamma, lora_scale, **options)

    if negative is None:
        return plain
    both = jax.tree.map(lambda n, p: jnp.concatenate([n, p]), negative, positive)

    def guided(x: jax.Array, now: Plan) -> jax.Array:
        gamma, lora_scale = (
            jnp.repeat(jnp.stack(pair), len(x), axis=0)
            for pair in (
                (now.negative_gamma, now.gamma),
                (now.negative_lora_scale, now.lora_scale),
            )
        )
        low, high = jnp.split(call(jnp.concatenate([x, x]), both, now, gamma, lora_scale), 2)
        velocity = low + cfg_scale * (high - low)
        if skip is None:
            return velocity
        without = partial(plain, x, now, skip=skip)
        return jax.lax.cond(
            now.skip_scale != 0,
            lambda: velocity + now.skip_scale * (high - without()),
            lambda: velocity,
        )

    return guided
