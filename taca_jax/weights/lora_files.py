"""Reads LoRA files in any known dialect, and writes them in three layouts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
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
    attach_adapter,
    summarise,
)
from taca_jax.formats.tensor_files import TensorFiles, open_tensors, write_tensors
from taca_jax.nn.lora import linears
from taca_jax.parallel.rules import parameter_sharding

Layout = Literal["peft", "kohya", "native"]


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file that was read.

    family: of the model that it is for. guessed: whether the file did not determine the family.
    left_out: keys of text encoders, which are not read.
    """

    family: Family
    dialect: str
    adapter: Adapter
    left_out: tuple[str, ...] = ()
    guessed: bool = False

    @property
    def summary(self) -> LoRASummary:
        return summarise(self.adapter, self.dialect, self.left_out)


def read_lora(path: Path | str, model: Any, mesh: Mesh | None = None) -> LoRASummary:
    """Attaches the factors of a LoRA file, in any dialect (or PEFT's folder), to a transformer,
    sharded over `mesh`; existing factors are replaced.

    Factors become float32, strengths are multiplied into b. Raises UserError, with the model
    unchanged, for a file that is absent, truncated, or of another model, with keys and both sizes.
    """
    family = family_of(model.config)
    file = load_adapter(Path(path), family, model.config)
    attach_adapter(file.adapter, model, str(path))
    if mesh is not None:
        for name, layer in linears(model):
            for factor in ("lora_a", "lora_b"):
                if (param := getattr(layer, factor)) is not None:
                    sharding = parameter_sharding(
                        family.kind.sharding, f"{name}.{factor}", param.shape, mesh
                    )
                    param.set_value(jax.device_put(param.get_value(), sharding))
    return file.summary


def write_lora(path: Path | str, model: Any, layout: Layout = "peft") -> LoRASummary:
    """Writes the factors attached to a model, atomically; in the file alpha is the rank.

    Raises UserError if the model has none, or the file cannot be written.
    """
    adapter = adapter_of(model)
    if not adapter:
        raise UserError(f"nothing to write to {path}: the model has no LoRA factors")
    outputs = {name: layer.kernel.shape[-1] for name, layer in linears(model)}
    family = family_of(model.config)
    return save_adapter(Path(path), adapter, layout, family, outputs, config=model.config)


def load_adapter(path: Path, family: Family | None = None, config: Any = None) -> LoRAFile:
    """The factors of a LoRA file, in any dialect.

    family, config: of the model that it is for. Without a family the likeliest one is chosen.
    Without a config, layers may be in the family's `placeholder_stack`, which only `save_adapter`
    accepts. Raises as `read_lora` does, except that sizes are not compared with a model's.
    """
    tensors = open_tensors(path)
    if native.is_native(tensors):
        adapter = native.parse(tensors)
        return LoRAFile(family or _family_of_layers([p for p, _ in adapter]), "native", adapter)
    guessed = False
    if family is None:
        family, guessed = recognise_family(tensors)
    dialect = recognise(tensors, family.lora.dialects(config))
    left_out = tuple(key for key in tensors.shapes if is_text_encoders(key))
    return LoRAFile(family, dialect.name, parse(tensors, dialect), left_out, guessed)


def recognise(tensors: TensorFiles, dialects: Sequence[Dialect]) -> Dialect:
    """The dialect that recognises most of the file's keys."""
    return max(dialects, key=lambda dialect: _known(tensors, dialect))


def recognise_family(tensors: TensorFiles) -> tuple[Family, bool]:
    """The family that a file is for, and whether that is a guess.

    If several families have its layers, the widths of their released models decide.
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
    return (fitting[0], False) if len(fitting) == 1 else (likeliest[0], True)


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
    path: Path,
    adapter: Adapter,
    layout: Layout,
    family: Family,
    outputs: Mapping[str, int] | None = None,
    *,
    config: Any = None,
) -> LoRASummary:
    """Writes factors as one safetensors file in a layout.

    outputs: output channels by path, for `kohya.tensors_of`. family, config: those that the file
    was read with. Raises UserError for factors without a name in the layout.
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
        write_tensors(path, native.tensors_of(adapter), {"format": "taca_jax"})
        return summarise(adapter, "native")
    if layout == "kohya":
        write_tensors(path, *kohya.tensors_of(adapter, outputs or {}, in_kohya))
        return summarise(adapter, in_kohya.name)
    write_tensors(path, *peft.tensors_of(adapter, in_peft.table))
    return summarise(adapter, in_peft.name)
