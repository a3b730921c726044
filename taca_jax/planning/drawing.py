"""What drawing needs on a slice of TPUs, according to the TPU compiler; without TPUs or weights.

The programs that read prompts, draw and decode are compiled for the slice. Memory is the compiler's
figure for each chip; times are lower bounds, as in `planning.plan`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from taca_jax.autoencoders.tiling import Tiling
from taca_jax.errors import UserError
from taca_jax.families.flops import forward_flops
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.fusion import step_options
from taca_jax.parallel.batches import filled_size
from taca_jax.parallel.choice import Place
from taca_jax.parallel.mesh import on
from taca_jax.pipelines.batching import batch_size
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.decoding import decoded
from taca_jax.pipelines.opening import Opening, downscale_in, samples_of, size_in, tokens_in
from taca_jax.planning.plan import GB, OutOfMemoryError, Plan, compiled_plan, devices_of, in_units
from taca_jax.planning.slices import Slice
from taca_jax.sampling.loop import Plan as StepValues
from taca_jax.sampling.loop import denoise, make_plan
from taca_jax.sampling.solvers import Sampler, evaluation_count
from taca_jax.taca import TacaConfig
from taca_jax.text.encoders import token_count
from taca_jax.weights.abstract import local_bytes
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import StoredPipeline, open_or_published

READING, DRAWING, DECODING = "reading a prompt", "drawing", "decoding"
_MODELS = {READING: "text encoders", DRAWING: "transformer", DECODING: "autoencoder"}


@dataclass(frozen=True)
class Drawing:
    """Pictures that are drawn at a time: how many, their size in pixels, the model's guidance, and
    how large ones are decoded."""

    pictures: int
    height: int
    width: int
    guidance: float
    tiling: Tiling | None = None


def plan_drawing(config: GenerateConfig) -> None:
    """Compiles what `config` draws for the slice `config.plan` and prints what it needs.

    Raises UserError if that does not fit.
    """
    if config.plan is None:
        raise UserError("plan is none; name a slice of TPUs, such as plan=v6e-4")
    where = Slice.of(config.plan)
    stored = open_or_published(config.base)
    dtype = jnp.dtype(config.dtype)
    options = LoadOptions(dtype, dtype, quantize=config.quantize, attention=config.attention)
    opening = Opening(stored, options, config.quantize_text)
    size = batch_size(config, stored, where.chips)
    place = opening.place(
        config.mesh,
        devices_of(where),
        stages=config.stages,
        samples=samples_of(stored, size, config.guidance),
    )
    guidance = stored.settings.guidance if config.guidance is None else config.guidance
    height, width = size_in(stored, config.height, config.width)
    drawing = Drawing(size, height, width, guidance, config.tiling)
    try:
        plans = drawing_plans(opening, place, where, drawing)
    except OutOfMemoryError as error:
        raise UserError(f"{error}; {_INSTEAD}") from error
    steps = stored.settings.steps if config.steps is None else config.steps
    Console().print(table(plans, place, drawing, steps, config.sampler))
    most = max(plans.values(), key=lambda plan: plan.memory)
    if not most.fits:
        raise UserError(
            f"{most.memory / GB:.1f} GB do not fit a chip's {where.chip.memory / GB:.1f} GB; "
            f"{_INSTEAD}"
        )


_INSTEAD = "try more chips, stages=true, quantize=int8, or a smaller batch_size"


def drawing_plans(
    opening: Opening, place: Place, where: Slice, drawing: Drawing
) -> dict[str, Plan]:
    """A plan of each stage: the memory of all that it finds there, and of drawing the FLOPs and
    times of one step.

    Raises OutOfMemoryError if a program is so large that the compiler gives up.
    """
    stored, mesh = opening.stored, place.mesh
    assert mesh is not None  # one chip is a mesh too
    models = opening.abstract(mesh)
    sizes = opening.model_bytes(mesh)
    plans = {}
    with on(mesh):
        for stage, model in _MODELS.items():
            if not models[model]:
                continue
            lowered, inputs, flops = _LOWER[stage](stored, models[model], mesh, drawing)
            plan = compiled_plan(
                lowered,
                *(where, mesh),
                batch=drawing.pictures,
                resolution=drawing.height,
                parts={model: sizes[model], "inputs": inputs},
                flops=flops,
            )
            if not place.stages:
                plan = replace(plan, parts={**sizes, "inputs": inputs})
            plans[stage] = plan
    return plans


def table(
    plans: Mapping[str, Plan], place: Place, drawing: Drawing, steps: int, sampler: Sampler
) -> Table:
    """The plans as a table to print; a step is there one evaluation of the transformer."""
    first = next(iter(plans.values()))
    where, chip = first.where, first.where.chip
    axes = " x ".join(f"{axis} {n}" for axis, n in first.mesh.shape.items() if n > 1)
    turns = "models take turns" if place.stages else "all models in memory"
    out = Table(
        title=f"{where.name} ({where.topology}), {axes or 'one chip'}: {drawing.pictures} of "
        f"{drawing.height} x {drawing.width} px at a time; {turns}"
    )
    for heading in ("on each chip", "parameters", "activations, program", "together"):
        out.add_column(heading, justify="left" if heading == "on each chip" else "right")
    for name, plan in plans.items():
        parameters = plan.memory - plan.program - plan.parts["inputs"]
        out.add_row(
            name,
            in_units(parameters, "B"),
            in_units(plan.program + plan.parts["inputs"], "B"),
            f"{in_units(plan.memory, 'B')}, {plan.memory / chip.memory:.0%}",
        )
    out.add_section()
    step = plans[DRAWING]
    out.add_row("the transformer's arithmetic, a step", "", "", in_units(step.flops, "FLOP"))
    for name, seconds in step.seconds.items():
        out.add_row(f"least time of a step for the {name}", "", "", in_units(seconds, "s"))
    least = step.seconds[step.bound]
    count = evaluation_count(sampler, steps)
    twice = "" if count == steps else f", {count} evaluations"
    out.add_row(f"least time of {steps} steps{twice}", "", "", in_units(count * least, "s"))
    out.add_row("estimated time of a step, by the compiler", "", "", in_units(step.estimated, "s"))
    out.add_row("of the chips' peak (MFU), at that", "", "", f"{step.utilisation:.0%}")
    rate = drawing.pictures / (count * step.estimated)
    out.add_row(f"pictures of {steps} steps a second, at that", "", "", f"{rate:.3g}")
    seconds = sum(plan.compile_seconds for plan in plans.values())
    out.add_row("compiled in", "", "", f"{seconds:.0f} s of CPU time")
    return out


def _array(mesh: Any, *shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))


def _read(
    stored: StoredPipeline, models: Sequence[Any], mesh: Any, drawing: Drawing
) -> tuple[Any, int, float]:
    """Of one prompt: the lowered program, the bytes of its inputs, and FLOPs, which are left out of
    this stage."""
    del drawing
    reading = stored.reading
    assert reading is not None  # there are encoders
    graph, state = nnx.split(reading.join(models, 0))
    configs = (stored.models[folder].config for folder in reading.folders)
    count = sum(token_count(config, stored.settings.text_length) for config in configs)
    tokens = _array(mesh, 1, count, dtype=jnp.int32)

    def read(state: nnx.State, tokens: jax.Array) -> Conditioning:
        return nnx.merge(graph, state)(tokens)

    return jax.jit(read).lower(state, tokens), local_bytes(tokens), 0.0


def _draw(
    stored: StoredPipeline, models: Sequence[Any], mesh: Any, drawing: Drawing
) -> tuple[Any, int, float]:
    """A loop of one step, which takes the memory of any number of steps."""
    config, family, reading = stored.transformer.config, stored.family, stored.reading
    embeds_guidance = family.embeds_guidance(config)
    times = samples_of(stored, 1, drawing.guidance)  # 2 with classifier-free guidance
    batch = filled_size(mesh, drawing.pictures, times)
    graph, state = nnx.split(models[0])
    rows, columns = (side // downscale_in(stored) for side in (drawing.height, drawing.width))
    image = tokens_in(stored, drawing.height, drawing.width)
    tokens = stored.settings.text_length if reading is None else reading.tokens

    def conditioning() -> Conditioning:
        return Conditioning(
            txt=_array(mesh, batch, tokens, config.txt_dim),
            pooled=_array(mesh, batch, config.pooled_dim),
            guidance=_array(mesh, batch) if embeds_guidance else None,
        )

    sigmas = stored.settings.schedule.sigmas(1, image)
    plan = jax.eval_shape(lambda: make_plan(sigmas, TacaConfig()))
    plan = jax.tree.map(lambda x: _array(mesh, *x.shape, dtype=x.dtype), plan)
    latents = _array(mesh, batch, rows, columns, config.latent_channels)
    inputs = (latents, plan, conditioning(), conditioning() if times > 1 else None)

    def draw(
        state: nnx.State,
        latents: jax.Array,
        plan: StepValues,
        positive: Conditioning,
        negative: Conditioning | None,
    ) -> jax.Array:
        model = nnx.merge(graph, state)
        return denoise(model, latents, plan, positive, negative, drawing.guidance)[0]

    flops = forward_flops(config, image=image, text=tokens)
    flops *= drawing.pictures * times
    run = jax.jit(draw, compiler_options=step_options())
    return run.lower(state, *inputs), local_bytes(inputs), flops


def _decode(
    stored: StoredPipeline, models: Sequence[Any], mesh: Any, drawing: Drawing
) -> tuple[Any, int, float]:
    """The pictures, or one of their tiles."""
    graph, state = nnx.split(models[0])
    downscale, tiling = downscale_in(stored), drawing.tiling
    shape = (drawing.pictures, drawing.height // downscale, drawing.width // downscale)
    if tiling is not None and tiling.is_for(drawing.height, drawing.width):
        size, _ = tiling.in_latents(downscale)
        shape = (1, min(size, shape[1]), min(size, shape[2]))
    latents = _array(mesh, *shape, stored.transformer.config.latent_channels)

    def decode(state: nnx.State, latents: jax.Array) -> jax.Array:
        return decoded(nnx.merge(graph, state), latents)

    return jax.jit(decode).lower(state, latents), local_bytes(latents), 0.0


_LOWER = {READING: _read, DRAWING: _draw, DECODING: _decode}
