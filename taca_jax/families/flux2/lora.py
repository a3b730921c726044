"""LoRA files of FLUX.2: the adapted layers, and their names in each dialect."""

from typing import Any

from taca_jax.families.flux2 import bfl, diffusers
from taca_jax.families.flux2.model import FLUX2_DEV, KLEIN_BASE_4B, KLEIN_BASE_9B
from taca_jax.formats.lora.alphas import PEFT_PREFIX, PREFIX
from taca_jax.formats.lora.dialect import Dialect, underscored
from taca_jax.formats.lora.kohya import PREFIXES as KOHYA_PREFIXES
from taca_jax.formats.tensor_files import Tensors

ATTENTION_TARGETS = (
    r"double_blocks\.(img|txt)\.qkv\.[qkv]",
    r"double_blocks\.(img|txt)\.out",
    r"single_blocks\.qkv_mlp",
    r"single_blocks\.out",
)
"""The attention's projections: q, k, v and out of both streams and of the single blocks, where they
are one layer with those of the MLP."""

DIALECTS = (
    Dialect("PEFT", diffusers.TABLE, (PREFIX, PEFT_PREFIX, "diffusion_model.", "")),
    Dialect("kohya", underscored(bfl.TABLE), KOHYA_PREFIXES),
    Dialect("kohya (diffusers' names)", underscored(diffusers.TABLE), KOHYA_PREFIXES),
    # ai-toolkit's, too.
    Dialect("ComfyUI", bfl.TABLE, ("diffusion_model.", bfl.COMFY_PREFIX, PEFT_PREFIX)),
    Dialect("Black Forest Labs", bfl.TABLE, ("",)),
)


def model_of(tensors: Tensors) -> Any:
    """The only released config whose width occurs in the file; None if there is none."""
    sizes = {size for shape in tensors.shapes.values() for size in shape}
    fitting = [c for c in (KLEIN_BASE_4B, KLEIN_BASE_9B, FLUX2_DEV) if c.hidden in sizes]
    return fitting[0] if len(fitting) == 1 else None
