"""Weights stored in float8, with or without a scale for each tensor.

In ComfyUI's scaled files a layer's weight is its float8 tensor times one number: `scale_weight` in
files marked by a tensor `scaled_fp8`, `weight_scale` in files whose layers each have a tensor
`comfy_quant` (JSON, as bytes). Scales of a layer's inputs are for float8 arithmetic, which is not
used here: they are ignored.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import FLOAT8, TensorFiles, summary

MARKER = "scaled_fp8"
SCALES, INPUT_SCALES = ("scale_weight", "weight_scale"), ("scale_input", "input_scale")
FORMAT, FORMATS = "comfy_quant", ("float8_e4m3fn", "float8_e5m2")
METADATA = "_quantization_metadata"
"""Header entry that can hold the formats of all layers, instead of one `comfy_quant` for each."""


@dataclass(frozen=True)
class ScaledTensors(TensorFiles):
    """Tensors of which those in `scales` are multiplied by a number when read, in float32."""

    scales: Mapping[str, np.float32]

    def read(self, name: str, *part: slice | None) -> np.ndarray:
        stored = super().read(name, *part)
        return stored if name not in self.scales else cast(stored, np.float32) * self.scales[name]


def unscaled(tensors: TensorFiles) -> TensorFiles:
    """The tensors with their scales applied; the scales themselves are left out.

    Weights without a scale are unchanged. Raises UserError for any quantisation other than float8
    with one scale per weight, and for scales without a weight.
    """
    last = {name: name.rpartition(".")[2] for name in tensors.shapes}
    about = {
        name: f"{name.rpartition('.')[0]}.weight" for name, word in last.items() if word in SCALES
    }
    problems = _other_formats(tensors, [name for name, word in last.items() if word == FORMAT])
    for name, weight in about.items():
        if weight not in tensors.shapes:
            problems.append(f"{name} scales {weight}, which is not there")
        elif math.prod(tensors.shapes[name]) != 1:
            problems.append(f"{name} is {tensors.shapes[name]} instead of one number")
    if problems:
        raise UserError(
            f"{tensors.where} is quantised as is not supported: {summary(problems)}; give a file "
            f"in float8 with one scale for each weight, or one that is not quantised"
        )
    scales = {weight: np.float32(tensors.read(name).item()) for name, weight in about.items()}
    if spoilt := [weight for weight, scale in scales.items() if not np.isfinite(scale)]:
        raise UserError(f"{tensors.where}: scales that are no numbers: {summary(spoilt)}")
    beside = (MARKER, FORMAT, *SCALES, *INPUT_SCALES)
    kept = [name for name, word in last.items() if word not in beside]
    if len(kept) == len(last):
        return tensors
    return ScaledTensors(
        tensors.where,
        {name: tensors.stored[name] for name in kept},
        [name for name in tensors.duplicates if name in kept],
        tensors.metadata,
        scales,
    )


def cast(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """The array in a dtype; much faster from float8 than ml_dtypes' own cast."""
    dtype = jnp.dtype(dtype)
    if array.dtype not in FLOAT8 or array.dtype == dtype:
        return array.astype(dtype, copy=False)
    table = np.arange(256, dtype=np.uint8).view(array.dtype).astype(dtype)
    return table[array.view(np.uint8)]


def _other_formats(tensors: TensorFiles, names: list[str]) -> list[str]:
    """Messages about layers in formats that are not supported."""
    said = {}
    try:
        listed = json.loads(tensors.metadata.get(METADATA, "{}")).get("layers", {})
        said |= {name: fields["format"] for name, fields in listed.items()}
        for name in names:
            fields = json.loads(tensors.read(name).tobytes())
            said[name.removesuffix(f".{FORMAT}")] = fields["format"]
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(
            f"{tensors.where} does not say readably how its layers are quantised ({error}); "
            "download or write it again"
        ) from None
    return [f"{name} is {form}" for name, form in said.items() if form not in FORMATS]
