"""Reads LoRA files in any known dialect, and writes them in three layouts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import families, family_of
from taca_jax.formats.lora import kohya, native, peft
from taca_jax.formats.lora.dialect import Dialect, is_text_encoders, parse
from taca_jax.formats.lora.factors import (
    Adapter,
    LoRASummary,
    adapter_of,
    append_adapter,
    check_fits,
    kernels_of,
    summarise,
)
from taca_jax.formats.tensor_files import (
    Shape,
    TensorFiles,
    headers_of,
    open_tensors,
    write_tensors,
)
from taca_jax.nn.kinds import shapes_of
from taca_jax.nn.lora import count_loras, remove_lora
from taca_jax.parallel.rules import parameter_sharding
from taca_jax.storage.places import Place, place
from taca_jax.taca import Gate

Layout = Literal["peft", "kohya", "native"]

GATE = "taca_jax_gate"
"""In a file's metadata, when the LoRA acts: a `Gate`. Others' files do not say."""


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file that was read.

    family: of the model that it is for. guessed: whether the file did not determine the family.
    left_out: keys of text encoders, which are not read. gate: when it acts, if the file says so.
    """

    family: Family
    dialect: str
    adapter: Adapter
    left_out: tuple[str, ...] = ()
    guessed: bool = False
    gate: Gate | None = None

    @property
    def summary(self) -> LoRASummary:
        return summarise(self.adapter, self.dialect, self.left_out)


def read_lora(path: Path | str, model: Any, mesh: Mesh | None = None) -> LoRASummary:
    """Attaches the factors of a LoRA file, in any dialect (or PEFT's folder), to a transformer,
    sharded over `mesh`; existing factors are replaced.

    Factors become float32, strengths are multiplied into b. Raises UserError as `open_lora` does,
    with the model unchanged.
    """
    file = open_lora(path, model)
    remove_lora(model)
    append_lora_file(file, model, mesh)
    return file.summary


def open_lora(path: Path | str, model: Any) -> LoRAFile:
    """Reads a LoRA file, in any dialect (or PEFT's folder), for a transformer, and leaves it as is.

    Raises UserError for a file that is absent, truncated, or of another model, with keys and both
    sizes.
    """
    file = load_adapter(Path(path), family_of(model.config), model.config)
    check_fits(file.adapter, kernels_of(model), str(path))
    return file


def append_lora_file(file: LoRAFile, model: Any, mesh: Mesh | None = None) -> None:
    """Attaches the factors of a file that `open_lora` read for this transformer, after those that
    it has, in float32 and sharded over `mesh`."""

    def put(path: str, factor: np.ndarray) -> jax.Array:
        if mesh is None:
            return jnp.asarray(factor)
        sharding = parameter_sharding(file.family.kind.sharding, path, factor.shape, mesh)
        return jax.device_put(factor, sharding)

    append_adapter(file.adapter, model, put)


def write_lora(
    path: Place | str, model: Any, layout: Layout = "peft", *, gate: Gate | None = None
) -> LoRASummary:
    """Writes the factors attached to a model, atomically; in the file alpha is the rank.

    gate: when the LoRA acts, which the file then says. Raises UserError if the model has none or
    several, or the file cannot be written.
    """
    adapter = adapter_of(model)
    if not adapter:
        raise UserError(f"nothing to write to {path}: the model has no LoRA factors")
    if (count := count_loras(model)) > 1:
        raise UserError(f"nothing is written to {path}: the model has {count} LoRAs; keep one")
    outputs = {name: kernel[-1] for name, kernel in kernels_of(model).items()}
    family = family_of(model.config)
    return save_adapter(
        place(path), adapter, layout, family, outputs, config=model.config, gate=gate
    )


def gate_in(tensors: TensorFiles) -> Gate | None:
    """When a LoRA acts, if its file says so. Raises UserError for a word that is unknown."""
    said = tensors.metadata.get(GATE)
    for gate in get_args(Gate):
        if said == gate:
            return gate
    if said is None:
        return None
    known = " or ".join(get_args(Gate))
    raise UserError(f"{tensors.where}: {GATE} is {said!r} in its metadata; expected {known}")


def load_adapter(path: Path, family: Family | None = None, config: Any = None) -> LoRAFile:
    """The factors of a LoRA file, in any dialect.

    family, config: of the model that it is for. Without a family the likeliest one is chosen.
    Without a config, layers may be in the family's `placeholder_stack`, which only `save_adapter`
    accepts. Raises as `read_lora` does, except that sizes are not compared with a model's.
    """
    return parse_lora(open_tensors(path), family, config)


def check_lora_file(path: Path, family: Family, config: Any) -> None:
    """Raises UserError as `open_lora` does, for a transformer of this config, from the header of
    the file alone."""
    file = parse_lora(headers_of(open_tensors(path)), family, config)
    check_fits(file.adapter, kernel_shapes(config), str(path))


def kernel_shapes(config: Any) -> dict[str, Shape]:
    """The shapes of all kernels of a config's model, by the path of the layer."""
    return {
        path.removesuffix(".kernel"): shape
        for path, shape in shapes_of(config).items()
        if path.endswith(".kernel")
    }


def parse_lora(tensors: TensorFiles, family: Family | None = None, config: Any = None) -> LoRAFile:
    """The factors in a file's tensors, as `load_adapter` describes."""
    gate = gate_in(tensors)
    if native.is_native(tensors):
        adapter = native.parse(tensors)
        family = family or _family_of_layers([p for p, _ in adapter])
        return LoRAFile(family, "native", adapter, gate=gate)
    guessed = False
    if family is None:
        family, guessed = recognise_family(tensors)
    dialect = recognise(tensors, family.lora.dialects(config))
    left_out = tuple(key for key in tensors.shapes if is_text_encoders(key))
    return LoRAFile(family, dialect.name, parse(tensors, dialect), left_out, guessed, gate)


def recognise(tensors: TensorFiles, dialects: Sequence[Dialect]) -> Dialect:
    """The dialect that recognises most of the file's keys."""
    return max(dialects, key=lambda dialect: _known(tensors, dialect))


def recognise_family(tensors: TensorFiles) -> tuple[Family, bool]:
    """The family that a file is for, and whether that is a guess.

    If several families have its layers, their released models decide: their widths, and if those
    are the same, the sizes of all layers.
    """
    counts = {
        family: max(_known(tensors, dialect) for dialect in family.lora.dialects(None))
        for family in families()
    }
    likeliest = [family for family, count in counts.items() if count == max(counts.values())]
    if len(likeliest) == 1:
        return likeliest[0], False
    sizes = {size for shape in tensors.shapes.values() for size in shape}
    fitting = [family for family in likeliest if sizes & _widths(family)]
    if len(fitting) > 1:
        fitting = [family for family in fitting if _fits_released(tensors, family)]
    return (fitting[0], False) if len(fitting) == 1 else (likeliest[0], True)


def _fits_released(tensors: TensorFiles, family: Family) -> bool:
    """Whether a file's factors fit a released model of the family."""
    for model in family.published.values():
        try:
            file = parse_lora(headers_of(tensors), family, model.transformer)
            check_fits(file.adapter, kernel_shapes(model.transformer), tensors.where)
        except UserError:
            continue
        return True
    return False


def _widths(family: Family) -> set[int]:
    return {model.transformer.hidden for model in family.published.values()}


def _known(tensors: TensorFiles, dialect: Dialect) -> int:
    return sum(dialect.find(key) is not None for key in tensors.shapes)


def _family_of_layers(paths: Sequence[str]) -> Family:
    """The family that has most of these layers, given by our names."""
    return max(families(), key=lambda family: sum(_has(family, path) for path in paths))


def _has(family: Family, path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in family.kind.sharding)


def save_adapter(
    path: Place,
    adapter: Adapter,
    layout: Layout,
    family: Family,
    outputs: Mapping[str, int] | None = None,
    *,
    config: Any = None,
    gate: Gate | None = None,
) -> LoRASummary:
    """Writes factors as one safetensors file in a layout.

    outputs: output channels by path, for `kohya.tensors_of`. family, config: those that the file
    was read with. gate: when the LoRA acts, for the metadata; None says nothing. Raises UserError
    for factors without a name in the layout.
    """
    in_peft, in_kohya, *_ = family.lora.dialects(config)
    placeholder = family.lora.placeholder_stack
    if placeholder is not None and config is None:
        placed = not any(path.startswith(f"{placeholder}.") for path, _ in adapter)
        if placed != (layout == "native"):
            instead = "" if placed else "write peft or kohya, or "
            raise UserError(
                f"which layers of a {family.title} are of which of our stacks, only a model says; "
                f"{instead}load the file into a pipeline"
            )
    if layout == "native":
        name = "native"
        tensors, metadata = native.tensors_of(adapter), {"format": "taca_jax"}
    elif layout == "kohya":
        name = in_kohya.name
        tensors, metadata = kohya.tensors_of(adapter, outputs or {}, in_kohya)
    else:
        name = in_peft.name
        tensors, metadata = peft.tensors_of(adapter, in_peft.table)
    write_tensors(path, tensors, metadata | ({} if gate is None else {GATE: gate}))
    return summarise(adapter, name)
