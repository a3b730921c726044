"""LoRA files on a model: read in any dialect that is known, written in three."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from taca_jax.checkpoint import kind_of
from taca_jax.errors import UserError
from taca_jax.formats import lora_bfl, lora_kohya, lora_native, lora_peft, lora_xlabs
from taca_jax.formats.lora_dialect import Dialect, is_text_encoders, parse
from taca_jax.formats.lora_factors import (
    Adapter,
    LoRASummary,
    adapter_of,
    attach_adapter,
    summarise,
)
from taca_jax.lora import linears
from taca_jax.tensor_files import TensorFiles, open_tensors, write_tensors

Layout = Literal["peft", "kohya", "native"]

DIALECTS: Mapping[str, tuple[Dialect, ...]] = {
    "flux": (
        lora_peft.FLUX,
        lora_kohya.FLUX,
        lora_kohya.FLUX_DIFFUSERS,
        lora_bfl.COMFYUI,
        lora_bfl.FAL,
        lora_bfl.FLUX,
        lora_xlabs.FLUX,
    ),
}
"""By the model's kind."""


@dataclass(frozen=True)
class LoRAFile:
    """What was read: the dialect's name, the factors, and the text encoders' keys, left out."""

    dialect: str
    adapter: Adapter
    left_out: tuple[str, ...] = ()

    @property
    def summary(self) -> LoRASummary:
        return summarise(self.adapter, self.dialect, self.left_out)


def read_lora(path: Path | str, model: Any) -> LoRASummary:
    """Attaches the factors of a LoRA file, in any dialect (or PEFT's folder), to a transformer.

    Factors become float32, strengths are folded into b. Raises UserError, and changes nothing, for
    a file that is absent, truncated, or of another model; it names keys and both sizes.
    """
    file = load_adapter(Path(path), kind_of(model.config))
    attach_adapter(file.adapter, model, str(path))
    return file.summary


def write_lora(path: Path | str, model: Any, layout: Layout = "peft") -> LoRASummary:
    """Writes the factors attached to a model, whole or not at all; alpha is the rank in the file.

    Raises UserError where the model has none, or the file cannot be written.
    """
    adapter = adapter_of(model)
    if not adapter:
        raise UserError(f"nothing to write to {path}: the model has no LoRA factors")
    outputs = {name: layer.kernel.shape[-1] for name, layer in linears(model)}
    return save_adapter(Path(path), adapter, layout, outputs)


def load_adapter(path: Path, kind: str = "flux") -> LoRAFile:
    """The factors of a LoRA file of a kind of model, whichever dialect it is in.

    Raises as `read_lora` does, bar that no model is there to compare sizes with.
    """
    tensors = open_tensors(path)
    if lora_native.is_native(tensors):
        return LoRAFile("native", lora_native.parse(tensors))
    dialect = recognise(tensors, kind)
    left_out = tuple(key for key in tensors.shapes if is_text_encoders(key))
    return LoRAFile(dialect.name, parse(tensors, dialect), left_out)


def recognise(tensors: TensorFiles, kind: str) -> Dialect:
    """The dialect that knows most of the file's keys."""

    def known(dialect: Dialect) -> int:
        return sum(dialect.find(key) is not None for key in tensors.shapes)

    return max(DIALECTS[kind], key=known)


def save_adapter(
    path: Path, adapter: Adapter, layout: Layout, outputs: Mapping[str, int] | None = None
) -> LoRASummary:
    """Writes factors as one safetensors file in a layout.

    `outputs` are the channels that each path's layers give, for `lora_kohya.tensors_of`.
    """
    if layout == "native":
        write_tensors(path, lora_native.tensors_of(adapter), {"format": "taca_jax"})
        name = "native"
    elif layout == "kohya":
        write_tensors(path, *lora_kohya.tensors_of(adapter, outputs or {}))
        name = lora_kohya.FLUX.name
    else:
        write_tensors(path, *lora_peft.tensors_of(adapter))
        name = lora_peft.FLUX.name
    return summarise(adapter, name)
