"""What a run takes on a slice of TPUs, said by the TPU's compiler: no TPU is needed, nor weights.

The very step that `train` would run is compiled for the slice. Memory is the compiler's own account
of each chip; times are a roofline's, from the arithmetic that the model needs and from the bytes
that must move, so that a real step takes longer.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from taca_jax.checkpoint import abstract_model, kind_of, load_config
from taca_jax.config import TrainConfig
from taca_jax.errors import UserError
from taca_jax.fields import from_json
from taca_jax.lora import add_lora
from taca_jax.mesh import on
from taca_jax.models.clip import CLIP_L, CLIPConfig
from taca_jax.models.flux import FLUX_DEV, FLUX_KREA, FLUX_SCHNELL, FluxConfig
from taca_jax.models.layers import LoRAParam, Quantized
from taca_jax.models.low_bit import Quantization
from taca_jax.models.t5 import T5_XXL, T5Config
from taca_jax.models.vae import FLUX_VAE
from taca_jax.pipelines.base import SETTINGS_FILE, PipelineSettings
from taca_jax.quantize import quantize
from taca_jax.sharding import batch_sharding, make_mesh, placement
from taca_jax.text import FluxText
from taca_jax.training.build import check_batch, check_sizes
from taca_jax.training.flops import step_flops
from taca_jax.training.slices import Slice
from taca_jax.training.step import Batch, TextToImage, Trainer, TrainState, make_trainer
from taca_jax.weights import find_weights

GB = 1e9


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    name: {
        "transformer": config,
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
        "autoencoder": FLUX_VAE,
    }
    for name, config in {
        "flux1-dev": FLUX_DEV,
        "flux1-krea-dev": FLUX_KREA,
        "flux1-schnell": FLUX_SCHNELL,
    }.items()
}
"""The parts of models as published, by the name of the folder that the presets expect."""

PUBLISHED_TEXT_LENGTH = {"flux1-dev": 512, "flux1-krea-dev": 512, "flux1-schnell": 256}
"""Tokens that T5 reads for each of them."""


@dataclass(frozen=True)
class Plan:
    """A step on a slice; bytes and seconds are of one chip.

    parts: bytes of each part's arrays. program: bytes that the compiled step needs beside them,
    activations above all. flops: of the whole step. gathered: bytes of parameters that each chip
    receives from others.
    """

    where: Slice
    mesh: Mesh
    batch: int
    resolution: int
    parts: Mapping[str, int]
    program: int
    flops: float
    gathered: float

    @property
    def memory(self) -> int:
        return sum(self.parts.values()) + self.program

    @property
    def fits(self) -> bool:
        return self.memory <= self.where.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """The least that the step can take, by what would bound it."""
        chip = self.where.chip
        return {
            "arithmetic": self.flops / self.where.chips / chip.flops,
            "wires": self.gathered / chip.wire_bandwidth,
        }


def plan(config: TrainConfig) -> None:
    """Compiles the step of `config` for the slice `config.plan` and prints what it takes.

    Raises UserError where it does not fit, naming the nearest slice where it does.
    """
    if config.data.encode == "cache":
        raise UserError(
            "plan compiles the step that encodes as it goes; leave out data.encode=cache, without "
            "which a step takes more memory"
        )
    assert config.plan is not None
    where = Slice.of(config.plan)
    try:
        found = make_plan(config, where)
    except OutOfMemoryError as error:
        reason = str(error)
    else:
        Console(width=max(100, Console().width)).print(table(found))
        if found.fits:
            return
        reason = f"{found.memory / GB:.1f} GB do not fit a chip's {where.chip.memory / GB:.1f} GB"
    for other in where.larger():
        # More chips share more samples: as many for each as were asked for.
        batch = config.data.batch_size * other.chips // where.chips
        data = dataclasses.replace(config.data, batch_size=batch)
        if _fits(dataclasses.replace(config, data=data), other):
            nearest = f"plan={other.name} data.batch_size={batch} fits"
            break
    else:
        nearest = "nor does any larger slice of that kind"
    smaller = "" if config.quantize == "nf4" or config.lora is None else " (or quantize=nf4)"
    raise UserError(f"{reason}; {nearest}{smaller}")


class OutOfMemoryError(Exception):
    """The compiler has no program that fits a chip: its own words."""


def _fits(config: TrainConfig, where: Slice) -> bool:
    try:
        return make_plan(config, where).fits
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


def make_plan(config: TrainConfig, where: Slice) -> Plan:
    """The plan of a run on a slice. Takes some minutes for a model of 12 B parameters, nearly all
    of them in the TPU's compiler: for the transformer, and for the autoencoder's convolutions.

    Raises OutOfMemoryError where the compiler itself refuses what is too large by far.
    """
    mesh = make_mesh(config.mesh, _devices(where.topology))
    check_batch(config, mesh)
    parts_of, text_length = _configs(config)
    model, autoencoder = _abstract(config, parts_of, mesh)
    check_sizes(config, model.transformer, autoencoder, mesh)
    # Padding is what is left out of the pooled mean, which no published model has.
    trainer, trained = make_trainer(config, model, autoencoder, pad_id=0, mesh=mesh)
    with on(mesh):
        state = trainer.abstract_state(trained)
        batch = _batch(config, model, text_length, mesh)
        step: Any = trainer.step
        compiled = _compiled(step.lower(state, trainer.frozen, trainer.autoencoder, batch))
    used = compiled.memory_analysis()
    parts = _parts(state, trainer, batch)
    patch = autoencoder.config.downscale * parts_of["transformer"].patch_size
    side = config.data.resolution // patch
    held = sum(parts.values())
    total = (
        used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
        + used.temp_size_in_bytes
        + used.generated_code_size_in_bytes
    )
    return Plan(
        where,
        mesh,
        config.data.batch_size,
        config.data.resolution,
        parts,
        max(total - held, 0),
        step_flops(config, parts_of["transformer"], image=side * side, text=text_length),
        _gathered(trainer, state, mesh, passes=_passes(config), dtype=jnp.dtype(config.dtype)),
    )


def table(plan: Plan) -> Table:
    """The plan as people read it."""
    chip = plan.where.chip
    axes = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.shape.items() if n > 1) or "one chip"
    out = Table(
        title=f"{plan.where.name} ({plan.where.topology}), {axes}: "
        f"{plan.batch} pictures of {plan.resolution} px a step"
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
    out.add_row("arithmetic of the step, all chips", in_units(plan.flops, "FLOP"))
    out.add_row("transformer's parameters received", in_units(plan.gathered, "B"), end_section=True)
    for name, seconds in plan.seconds.items():
        out.add_row(f"least time for {name}", in_units(seconds, "s"))
    bound = max(plan.seconds, key=plan.seconds.__getitem__)
    out.add_row("bound by", bound)
    return out


PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def in_units(value: float, unit: str) -> str:
    """A quantity with three digits or more in the largest unit that it fills: `1.25 GB`, `3 ms`."""
    factor, prefix = next(
        (each for each in PREFIXES if value >= each[0] and (unit != "s" or each[0] <= 1)),
        (1.0, ""),
    )
    number = value / factor
    return f"{number:,.0f} {prefix}{unit}" if number >= 100 else f"{number:.3g} {prefix}{unit}"


def _devices(topology: str) -> list[Any]:
    """Devices of a topology that is not there."""
    # Read when libtpu is loaded: without them it asks the network where it is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # JAX raises what loading a plugin raises
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"plan needs the TPU's compiler (pip install libtpu): {reason}") from error


def _abstract(config: TrainConfig, parts: Mapping[str, Any], mesh: Mesh) -> tuple[TextToImage, Any]:
    """The model to train and its autoencoder, of shapes with places instead of parameters."""
    dtype = jnp.dtype(config.dtype)
    base_dtype = dtype if config.lora is not None else jnp.dtype(jnp.float32)
    place = placement(mesh)
    assert place is not None

    def made(part: str, **options: Any) -> Any:
        model = abstract_model(parts[part], dtype=dtype, **options)
        quantize(model, kind_of(parts[part]), _quantization(config, part, parts[part]))
        if part == "transformer" and config.lora is not None:
            lora = config.lora
            graph, state = nnx.split(model)
            model = nnx.eval_shape(lambda: _with_lora(graph, state, lora))
        kind = kind_of(parts[part])
        graph, state = nnx.split(model)
        for path, param in nnx.to_flat_state(state):
            name = ".".join(map(str, path))
            wide = jnp.float32 if isinstance(param, LoRAParam) else base_dtype
            if isinstance(param, Quantized):
                wide = param.get_value().dtype
            sharding = place(kind, name, param.shape)
            param.set_value(jax.ShapeDtypeStruct(param.shape, wide, sharding=sharding))
        return nnx.merge(graph, state)

    transformer = made("transformer", remat=config.remat)
    clip = next((part for part, c in parts.items() if isinstance(c, CLIPConfig)), None)
    t5 = made(next(part for part, c in parts.items() if isinstance(c, T5Config)))
    encoder = t5 if clip is None else FluxText(made(clip), t5)
    return TextToImage(transformer, encoder), made("autoencoder")


def _quantization(config: TrainConfig, part: str, model: Any) -> Quantization:
    """What a part's kernels are kept in."""
    if part == "transformer":
        return config.quantize
    return config.quantize_text if isinstance(model, T5Config) else "none"


def _with_lora(graph: nnx.GraphDef, state: nnx.State, lora: Any) -> nnx.Module:
    filled = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    model = nnx.merge(graph, filled)
    add_lora(model, lora, rngs=nnx.Rngs(0))
    return model


def _configs(config: TrainConfig) -> tuple[dict[str, Any], int]:
    """The config of each part, of the base's folder, of a published model or of a new one; and how
    many tokens T5 reads."""
    if config.base is None:
        assert config.model is not None  # TrainConfig saw to both
        assert config.text.encoder is not None
        found = {
            "transformer": config.model,
            "text_encoder": config.text.encoder,
            "autoencoder": config.pixels,
        }
        text_length = config.text.length
    else:
        found, text_length = _configs_of_base(config.base)
    if config.autoencoder != "pixels":
        found["autoencoder"] = load_config(config.autoencoder)
    kinds = [type(each) for each in found.values()]
    missing = [
        words
        for words, there in (
            ("a transformer", "transformer" in found),
            ("a T5", T5Config in kinds),
            ("an autoencoder (autoencoder=FOLDER)", "autoencoder" in found),
        )
        if not there
    ]
    if missing:
        raise UserError(f"base={config.base} lacks {', '.join(missing)}, which training needs")
    if not isinstance(found["transformer"], FluxConfig):
        kind = kind_of(found["transformer"])
        raise UserError(f"base={config.base} is of kind {kind}; only FLUX is planned: plan=none")
    return found, text_length


def _configs_of_base(base: str) -> tuple[dict[str, Any], int]:
    folder = find_weights(base)
    names = ("transformer", "text_encoder", "text_encoder_2", "autoencoder")
    if folder.is_dir():
        found = {n: load_config(folder / n) for n in names if (folder / n).is_dir()}
        settings = folder / SETTINGS_FILE
        if not settings.is_file():
            raise UserError(f"base={base} is no pipeline folder: it has no {SETTINGS_FILE}")
        return found, from_json(PipelineSettings, settings.read_text(), str(settings)).text_length
    if folder.name not in PUBLISHED:
        raise UserError(
            f"base={base} is not there; plan for {', '.join(PUBLISHED)} needs no folder"
        )
    return dict(PUBLISHED[folder.name]), PUBLISHED_TEXT_LENGTH[folder.name]


def _batch(config: TrainConfig, model: TextToImage, text_length: int, mesh: Mesh) -> Batch:
    sharding = batch_sharding(mesh, leading=1)
    shape = (config.grad_accumulation, config.data.batch_size)
    side = config.data.resolution
    encoder = model.text_encoder
    clip_length = encoder.clip.config.max_tokens if isinstance(encoder, FluxText) else 0
    tokens_shape = (*shape, clip_length + text_length)
    image: Any = jax.ShapeDtypeStruct((*shape, side, side, 3), jnp.uint8, sharding=sharding)
    tokens: Any = jax.ShapeDtypeStruct(tokens_shape, jnp.int32, sharding=sharding)
    return Batch(image=image, tokens=tokens)


def _parts(state: TrainState, trainer: Trainer, batch: Batch) -> dict[str, int]:
    parts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(trainer.frozen)[0]:
        name = _WORDS[str(path[0].key)]
        parts[name] = parts.get(name, 0) + _local_bytes(leaf)
    parts["autoencoder"] = sum(map(_local_bytes, jax.tree.leaves(trainer.autoencoder)))
    name = "trained parameters, optimizer"
    parts[name] = sum(map(_local_bytes, jax.tree.leaves(state)))
    parts["batch"] = sum(map(_local_bytes, jax.tree.leaves(batch)))
    return {name: size for name, size in parts.items() if size}


_WORDS = {"transformer": "transformer, frozen", "text_encoder": "text encoders, frozen"}


def _local_bytes(array: Any) -> int:
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    # A TPU keeps 4-bit numbers two to a byte; on the host each takes a whole one.
    bits = 4 if array.dtype == jnp.uint4 else 8 * array.dtype.itemsize
    return math.prod(shape) * bits // 8


def _passes(config: TrainConfig) -> int:
    """How often a step reads every parameter of the transformer."""
    return 3 if config.remat == "full" else 2


def _gathered(
    trainer: Trainer, state: TrainState, mesh: Mesh, *, passes: int, dtype: jnp.dtype
) -> float:
    """Bytes of the transformer's parameters that a chip receives over `fsdp` in a step.

    Trained ones are received in every pass too, and the sums of their gradients once. int8's codes
    are received as they are; each chip decodes its share of nf4's, which is received in `dtype`.
    """

    def size(array: Any) -> int:
        decoded = 2 * dtype.itemsize if array.dtype == jnp.uint4 else 1
        return _local_bytes(array) * decoded

    others = mesh.shape["fsdp"] - 1
    frozen, trained = (
        sum(size(x) for x in jax.tree.leaves(tree.get("transformer", {})))
        for tree in (trainer.frozen, state.trained)
    )
    return others * (frozen * passes + trained * (passes + 1))
