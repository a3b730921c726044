"""LoRA files of FLUX.1: the adapted layers, and their names in each dialect.

XLabs-AI/x-flux names the attention processors: `double_blocks.0.processor.qkv_lora1.down.weight`
is of the image stream, `qkv_lora2` of the text stream; those of single blocks have no number. q, k
and v are one layer, which in single blocks does not include the MLP.
"""

from typing import Any

from taca_jax.families.flux import bfl, diffusers
from taca_jax.families.flux.model import FLUX_DEV
from taca_jax.formats.key_table import Rule, Table, fused_linear, linear
from taca_jax.formats.lora.alphas import PEFT_PREFIX, PREFIX
from taca_jax.formats.lora.dialect import Dialect, underscored
from taca_jax.formats.lora.kohya import PREFIXES as KOHYA_PREFIXES
from taca_jax.formats.tensor_files import Tensors

ATTENTION_TARGETS = (
    r"double_blocks\.(img|txt)\.qkv\.[qkv]",
    r"double_blocks\.(img|txt)\.out",
    r"single_blocks\.qkv\.[qkv]",
    r"single_blocks\.out",
)
"""The attention's projections: q, k, v and out of both streams and of the single blocks (whose out
projection has the outputs of attention and MLP as its inputs)."""

_DOUBLE, _SINGLE = "double_blocks.{layer}.processor", "single_blocks.{layer}.processor"


def _fused(theirs: str, ours: str) -> tuple[Rule, ...]:
    return fused_linear(theirs, *(f"{ours}.{x}" for x in "qkv"))


_XLABS = Table(
    "a FLUX transformer in XLabs' names",
    (
        *_fused(f"{_DOUBLE}.qkv_lora1", "double_blocks.img.qkv"),
        *linear(f"{_DOUBLE}.proj_lora1", "double_blocks.img.out"),
        *_fused(f"{_DOUBLE}.qkv_lora2", "double_blocks.txt.qkv"),
        *linear(f"{_DOUBLE}.proj_lora2", "double_blocks.txt.out"),
        *_fused(f"{_SINGLE}.qkv_lora", "single_blocks.qkv"),
        *linear(f"{_SINGLE}.proj_lora", "single_blocks.out"),
    ),
)

DIALECTS = (
    Dialect("PEFT", diffusers.TABLE, (PREFIX, PEFT_PREFIX, "diffusion_model.", "")),
    Dialect("kohya", underscored(bfl.TABLE), KOHYA_PREFIXES),
    Dialect("kohya (diffusers' names)", underscored(diffusers.TABLE), KOHYA_PREFIXES),
    Dialect("ComfyUI", bfl.TABLE, ("diffusion_model.", bfl.COMFY_PREFIX)),
    Dialect("fal", bfl.TABLE, (PEFT_PREFIX,)),
    Dialect("Black Forest Labs", bfl.TABLE, ("",)),
    Dialect("XLabs", _XLABS, ("diffusion_model.", "")),
)


def model_of(tensors: Tensors) -> Any:
    """The released config if one of its widths occurs in the file."""
    sizes = {size for shape in tensors.shapes.values() for size in shape}
    return FLUX_DEV if FLUX_DEV.hidden in sizes else None
