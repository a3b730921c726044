"""LoRA files on a model: read in any layout that is known, written in PEFT's or our own."""

from pathlib import Path
from typing import Literal

from flax import nnx

from taca_jax.errors import UserError
from taca_jax.formats import lora_native, lora_peft
from taca_jax.formats.lora_factors import (
    Adapter,
    LoRASummary,
    adapter_of,
    attach_adapter,
    summarise,
)
from taca_jax.tensor_files import open_tensors, write_tensors

Layout = Literal["peft", "native"]


def read_lora(path: Path | str, model: nnx.Module) -> LoRASummary:
    """Attaches the factors of a LoRA file (PEFT's layout or ours, or its folder) to a FLUX
    transformer.

    Factors become float32, strengths are folded into b. Raises UserError, and changes nothing, for
    a file that is absent, truncated, or of another model; it names keys and both sizes.
    """
    adapter = load_adapter(Path(path))
    attach_adapter(adapter, model, str(path))
    return summarise(adapter)


def write_lora(path: Path | str, model: nnx.Module, layout: Layout = "peft") -> LoRASummary:
    """Writes the factors attached to a model, whole or not at all; alpha is the rank in the file.

    Raises UserError where the model has none, or the file cannot be written.
    """
    adapter = adapter_of(model)
    if not adapter:
        raise UserError(f"nothing to write to {path}: the model has no LoRA factors")
    save_adapter(Path(path), adapter, layout)
    return summarise(adapter)


def load_adapter(path: Path) -> Adapter:
    """The factors of a LoRA file, whichever layout it is in."""
    tensors = open_tensors(path)
    if lora_native.is_native(tensors):
        return lora_native.parse(tensors)
    return lora_peft.parse(tensors)


def save_adapter(path: Path, adapter: Adapter, layout: Layout) -> None:
    """Writes factors as one safetensors file in a layout."""
    if layout == "native":
        write_tensors(path, lora_native.tensors_of(adapter), {"format": "taca_jax"})
    else:
        write_tensors(path, *lora_peft.tensors_of(adapter))
