"""What a run needs on a slice of TPUs, according to the TPU compiler; without TPUs or weights.

The same step that `train` would run is compiled for the slice. Memory is the compiler's figure for
each chip; times are those of a roofline model, from the model's FLOPs and the bytes that must move,
so that a real step takes longer.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

from taca_jax.errors import UserError
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.batches import batch_sharding
from taca_jax.parallel.mesh import on
from taca_jax.planning.slices import Slice
from taca_jax.planning.traffic import Traffic, read_traffic
from taca_jax.training.config import TrainConfig
from taca_jax.training.encoding import latents_program, text_program
from taca_jax.training.models import RunModels, open_models
from taca_jax.training.step import Batch, EncodedBatch, Trainer, TrainState, make_trainer
from taca_jax.weights.abstract import local_bytes

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """A program compiled for a slice; bytes and seconds are those of one chip.

    batch: samples. parts: bytes of the arguments, by part. program: bytes that the compiled program
    needs in addition, mostly activations. flops: of the transformer, for all samples. further:
    FLOPs that the program does beyond those (`families.flops.further_flops`). remat: what its
    backward pass recomputes, if it has one. compile_seconds: CPU time, all cores together. text: of
    the compiled program.
    """

    where: Slice
    mesh: Mesh
    batch: int
    resolution: int
    parts: Mapping[str, int]
    program: int
    flops: float
    further: float
    remat: Remat | None
    traffic: Traffic
    compile_seconds: float
    text: str = field(repr=False)

    @property
    def memory(self) -> int:
        return sum(self.parts.values()) + self.program

    @property
    def fits(self) -> bool:
        return self.memory <= self.where.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """Lower bounds of the program's time, one for each resource."""
        chip = self.where.chip
        return {
            "matrix units": (self.flops + self.further) / self.where.chips / chip.flops,
            "memory": self.traffic.memory / chip.memory_bandwidth,
            "wires": self.traffic.together.received / chip.wire_bandwidth,
        }

    @property
    def bound(self) -> str:
        """The resource with the largest lower bound."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def estimated(self) -> float:
        """Seconds of the compiled program, by the compiler's own estimate of each of its operations
        and the cycles of our attention kernels. A real step is often faster: estimates of
        elementwise operations are up to six times too high."""
        return self.traffic.seconds

    @property
    def utilisation(self) -> float:
        """The model's FLOPs in the estimated time, as a share of what the chips can do (MFU)."""
        return self.flops / self.where.chips / self.where.chip.flops / self.estimated

    @property
    def hidden(self) -> float:
        """The share of the wires' time that the schedule overlaps with work; 1 without traffic."""
        wires = self.seconds["wires"]
        return 1.0 if not wires else max(0.0, 1 - self.traffic.waited / wires)


def plan(config: TrainConfig) -> None:
    """Compiles the step of `config` for the slice `config.plan` and prints what it needs.

    Raises UserError if it does not fit, naming the nearest slice on which it does.
    """
    if config.plan is None:
        raise UserError("plan is none; name a slice of TPUs, such as plan=v5e-16")
    where = Slice.of(config.plan)
    models = open_models(config, published=True)
    try:
        found = make_plan(models, where)
    except OutOfMemoryError as error:
        reason = str(error)
    else:
        before = encoding_plans(models, where) if config.data.encode == "cache" else {}
        Console().print(table(found, before))
        for name, each in before.items():
            if not each.fits:
                raise UserError(
                    f"{name} takes {each.memory / GB:.1f} GB, which do not fit a chip's "
                    f"{where.chip.memory / GB:.1f} GB; try quantize_text=int8, or a smaller "
                    "data.batch_size"
                )
        if found.fits:
            return
        reason = f"{found.memory / GB:.1f} GB do not fit a chip's {where.chip.memory / GB:.1f} GB"
    if config.mesh.open and models.choose_mesh(devices_of(where)).shape["data"] > 1:
        shared = replace(config, mesh=replace(config.mesh, fsdp=-1))
        if _fits(replace(models, config=shared), where):
            raise UserError(f"{reason}; mesh.fsdp=-1, which shares parameters, fits")
    for other in where.larger():
        # The number of samples per chip stays as requested.
        batch = config.data.batch_size * other.chips // where.chips
        data = replace(config.data, batch_size=batch)
        if _fits(replace(models, config=replace(config, data=data)), other):
            nearest = f"plan={other.name} data.batch_size={batch} fits"
            break
    else:
        nearest = "nor does any larger slice of that kind"
    smaller = []
    if config.lora is not None:
        smaller += ["quantize=nf4"] if config.quantize != "nf4" else []
        smaller += ["quantize_text=int8"] if config.quantize_text == "none" else []
        smaller += ["data.encode=cache"] if config.data.encode == "online" else []
    smaller += ["remat=full"] if config.remat != "full" else []
    instead = f" (or with less: {', '.join(smaller)})" if smaller else ""
    raise UserError(f"{reason}; {nearest}{instead}")


class OutOfMemoryError(Exception):
    """The compiler found no program that fits a chip; the message is the compiler's."""


def _fits(models: RunModels, where: Slice) -> bool:
    try:
        return make_plan(models, where).fits
    except OutOfMemoryError:
        return False


def _compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = re.search(r"RESOURCE_EXHAUSTED: (?:E\d+: \w+: )?(.*?)(?:\. HLO|\n|$)", str(error))
        if said is None:
            raise
        raise OutOfMemoryError(f"the compiler says: {said[1]}") from error


def make_plan(models: RunModels, where: Slice) -> Plan:
    """The plan of a run on a slice.

    For a model of 12 B parameters this takes some minutes, nearly all of them in the TPU compiler:
    for the transformer, and for the autoencoder's convolutions. Raises OutOfMemoryError if the
    program is so large that the compiler gives up.
    """
    config = models.config
    mesh = models.choose_mesh(devices_of(where))
    models = models.on_mesh(mesh)
    model, autoencoder = models.abstract()
    batch = _batch(models, autoencoder)
    encoder = autoencoder
    if config.data.encode == "cache":
        model.text_encoder, encoder = None, autoencoder.config
    with on(mesh):
        trainer, trained = make_trainer(config, model, encoder, mesh)
        state = trainer.abstract_state(trained)
        step: Any = trainer.step
        lowered = step.lower(state, trainer.frozen, batch)
        return compiled_plan(
            lowered,
            where,
            mesh,
            batch=models.step_samples,
            resolution=config.data.resolution,
            parts=_parts(state, trainer, batch),
            flops=models.step_flops,
            further=models.further_flops,
            remat=models.remat,
        )


def compiled_plan(
    lowered: Any,
    where: Slice,
    mesh: Mesh,
    *,
    batch: int,
    resolution: int,
    parts: Mapping[str, int],
    flops: float,
    further: float = 0.0,
    remat: Remat | None = None,
) -> Plan:
    """The plan of any lowered program; see Plan for the arguments.

    Raises OutOfMemoryError as `make_plan` does.
    """
    start = time.process_time()
    compiled = _compiled(lowered)
    seconds = time.process_time() - start
    used = compiled.memory_analysis()
    total = (
        used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
        + used.temp_size_in_bytes
        + used.generated_code_size_in_bytes
    )
    text = compiled.as_text()
    return Plan(
        where=where,
        mesh=mesh,
        batch=batch,
        resolution=resolution,
        parts=parts,
        program=max(total - sum(parts.values()), 0),
        flops=flops,
        further=further,
        remat=remat,
        traffic=read_traffic(text, where.chip),
        compile_seconds=seconds,
        text=text,
    )


def encoding_plans(models: RunModels, where: Slice) -> dict[str, Plan]:
    """Plans of what encodes a batch of pictures, and of captions, before training starts
    (data.encode=cache). All encoders are in memory then, and the transformer is not.

    Raises OutOfMemoryError as `make_plan` does.
    """
    config, side = models.config, models.config.data.resolution
    mesh = models.choose_mesh(devices_of(where))
    models = models.on_mesh(mesh)
    model, autoencoder = models.abstract()
    text_encoder, dtype, places = model.text_encoder, jnp.dtype(config.dtype), batch_sharding(mesh)
    programs = {
        "encoding pictures": (latents_program, autoencoder, jnp.uint8, (side, side, 3)),
        "encoding captions": (text_program, text_encoder, jnp.int32, (models.token_ids,)),
    }
    states = {"text encoders": nnx.state(text_encoder), "autoencoder": nnx.state(autoencoder)}
    sizes = {name: local_bytes(state) for name, state in states.items()}
    plans = {}
    with on(mesh):
        for name, (program, encoder, kind, shape) in programs.items():
            state = nnx.state(encoder)
            batch = jax.ShapeDtypeStruct((config.data.batch_size, *shape), kind, sharding=places)
            run = jax.jit(program(encoder, dtype), out_shardings=places)
            inputs = local_bytes(batch)
            plan = compiled_plan(
                run.lower(state, batch),
                *(where, mesh),
                batch=config.data.batch_size,
                resolution=side,
                parts={"encoder": local_bytes(state), "inputs": inputs},
                flops=0.0,
            )
            plans[name] = replace(plan, parts={**sizes, "inputs": inputs})
    return plans


def table(plan: Plan, before: Mapping[str, Plan] | None = None) -> Table:
    """The plan as a table to print, with the memory of what is done before the first step."""
    chip = plan.where.chip
    axes = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.shape.items() if n > 1) or "one chip"
    out = Table(
        title=f"{plan.where.name} ({plan.where.topology}), {axes}: "
        f"{plan.batch} picture{'s' if plan.batch > 1 else ''} of {plan.resolution} px a step"
    )
    out.add_column("on each chip")
    out.add_column("", justify="right")
    for name, size in plan.parts.items():
        out.add_row(name, in_units(size, "B"))
    out.add_row("activations, gathered parameters, program", in_units(plan.program, "B"))
    share = plan.memory / chip.memory
    out.add_row(
        "together", f"{in_units(plan.memory, 'B')}, {share:.0%} of its memory", end_section=True
    )
    for name, each in (before or {}).items():
        share = each.memory / chip.memory
        out.add_row(f"{name}, before", f"{in_units(each.memory, 'B')}, {share:.0%}")
    if before:
        out.add_section()
    out.add_row("the transformer's arithmetic, all chips", in_units(plan.flops, "FLOP"))
    if plan.further:
        out.add_row("recomputed, and attention's gradients", in_units(plan.further, "FLOP"))
    if plan.remat is not None:
        out.add_row("recomputed in the backward pass (remat)", plan.remat)
    out.add_row("read from memory and written", in_units(plan.traffic.memory, "B"))
    for kind, moved in sorted(plan.traffic.collectives.items()):
        out.add_row(
            f"{moved.count:,} x {kind}",
            f"{in_units(moved.received, 'B')} received, "
            f"{moved.asynchronous_share:.0%} asynchronously",
        )
    out.columns[0].no_wrap = True
    out.add_section()
    for name, seconds in plan.seconds.items():
        out.add_row(f"least time for the {name}", in_units(seconds, "s"))
    out.add_row("bound by", f"the {plan.bound}")
    if plan.seconds["wires"]:
        out.add_row("wires' time hidden by the schedule", f"{plan.hidden:.0%}")
    out.add_row("estimated time, by the compiler", in_units(plan.estimated, "s"))
    out.add_row("pictures a second, at that", f"{plan.batch / plan.estimated:.3g}")
    out.add_row("of the chips' peak (MFU), at that", f"{plan.utilisation:.0%}")
    out.add_row("compiled in", f"{plan.compile_seconds:.0f} s of CPU time")
    return out


PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def in_units(value: float, unit: str) -> str:
    """A quantity in three digits, in the largest unit of which it is at least 1: `1.25 GB`."""
    factor, prefix = next(
        (each for each in PREFIXES if value >= each[0] and (unit != "s" or each[0] <= 1)),
        (1.0, ""),
    )
    number = value / factor
    return f"{number:,.0f} {prefix}{unit}" if number >= 100 else f"{number:.3g} {prefix}{unit}"


def devices_of(where: Slice) -> list[Any]:
    """The abstract devices of a slice, to compile for.

    Raises UserError if the TPU compiler is not installed.
    """
    # Read when libtpu is loaded; without them it queries the network for its host's metadata.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=where.topology).devices
    except Exception as error:  # JAX raises what loading a plugin raises
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"plan needs the TPU's compiler (pip install libtpu): {reason}") from error


def _batch(models: RunModels, autoencoder: Any) -> Batch | EncodedBatch:
    """The step's batch, of ShapeDtypeStructs."""
    config = models.config
    sharding = None if models.mesh is None else batch_sharding(models.mesh, leading=1)

    def array(dtype: DTypeLike, *shape: int) -> Any:
        leading = (config.grad_accumulation, config.data.batch_size)
        return jax.ShapeDtypeStruct((*leading, *shape), dtype, sharding=sharding)

    side = config.data.resolution
    if config.data.encode == "online":
        return Batch(
            image=array(jnp.uint8, side, side, 3),
            tokens=array(jnp.int32, models.token_ids),
            labels=None if models.labels is None else array(jnp.uint8, *models.labels),
        )
    dtype = jnp.dtype(config.dtype)
    latent_side = side // autoencoder.config.downscale
    latents = (latent_side, latent_side, autoencoder.config.latent_channels)
    # The dtype in which the encoding stage stores latents.
    kept = dtype if jax.tree.leaves(nnx.state(autoencoder)) else jnp.dtype(jnp.float32)
    return EncodedBatch(
        mean=array(kept, *latents),
        logvar=array(kept, *latents) if config.data.latents == "sample" else None,
        txt=array(dtype, models.reading.tokens, models.transformer.txt_dim),
        pooled=array(jnp.float32, models.transformer.pooled_dim),
    )


def _parts(state: TrainState, trainer: Trainer, batch: Any) -> dict[str, int]:
    parts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(trainer.frozen.model)[0]:
        name = _WORDS[str(path[0].key)]
        parts[name] = parts.get(name, 0) + local_bytes(leaf)
    parts["autoencoder"] = local_bytes(trainer.frozen.autoencoder)
    parts["trained parameters, optimizer"] = local_bytes(state)
    parts["batch"] = local_bytes(batch)
    return {name: size for name, size in parts.items() if size}


_WORDS = {"transformer": "transformer, frozen", "text_encoder": "text encoders, frozen"}
