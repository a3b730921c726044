"""The dialects of LoRA files of Stable Diffusion 3.

A model's own layers decide which of its stacks a layer is in, so each config has its own names.
Without a model, all are taken for layers of one stack that no model has: enough to rename them.
"""

from functools import cache

from taca_jax.families.sd3 import diffusers as sd3_diffusers
from taca_jax.families.sd3 import stability as sd3_native
from taca_jax.families.sd3.model import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Config
from taca_jax.formats.key_table import Table
from taca_jax.formats.lora.alphas import PEFT_PREFIX, PREFIX
from taca_jax.formats.lora.dialect import Dialect, underscored
from taca_jax.formats.lora.kohya import PREFIXES as KOHYA_PREFIXES
from taca_jax.formats.tensor_files import Tensors

ATTENTION_TARGETS = (
    r"(dual_blocks|joint_blocks|last_block)\.(img|txt)\.qkv\.[qkv]",
    r"(dual_blocks|joint_blocks|last_block)\.(img|txt)\.out",
)
"""q, k, v and out of both streams in the joint attention, as published; the second attention of
dual blocks has none."""

UNPLACED = "any_blocks"
"""A stack that no model has, for layers of which no model has said in which stack they are."""

_DIFFUSERS = Table(
    "a Stable Diffusion 3 transformer in diffusers' layout",
    tuple(
        rule
        for rule in sd3_diffusers.joint_block(sd3_diffusers.BLOCK, UNPLACED, dual=True)
        # Of the last block diffusers swaps the halves; which is the last, no LoRA says.
        if not rule.ours.startswith(f"{UNPLACED}.txt.mod")
    ),
)
_NATIVE = Table(
    "a Stable Diffusion 3 transformer in Stability AI's layout",
    sd3_native.joint_block(sd3_native.BLOCK, UNPLACED, dual=True),
)


@cache
def dialects(config: SD3Config | None) -> tuple[Dialect, ...]:
    """What a file may be in, PEFT's first, then kohya's; None where the model is not known."""
    if config is None:
        diffusers, native = _DIFFUSERS, _NATIVE
    else:
        diffusers, native = sd3_diffusers.table_of(config), sd3_native.table_of(config)
    return (
        Dialect("PEFT", diffusers, (PREFIX, PEFT_PREFIX, "")),
        Dialect("kohya", underscored(native), KOHYA_PREFIXES),
        Dialect("kohya (diffusers' names)", underscored(diffusers), KOHYA_PREFIXES),
        Dialect("ComfyUI", native, ("diffusion_model.", sd3_native.PREFIX)),
        Dialect("Stability AI", native, ("",)),
    )


def model_of(tensors: Tensors) -> SD3Config | None:
    """The only released model that a file can be for; None where there are none or several."""
    sizes = {size for shape in tensors.shapes.values() for size in shape}
    dual = any("attn2" in name or name.startswith("dual_blocks.") for name in tensors.shapes)
    fitting = [
        config
        for config in (SD35_MEDIUM, SD35_LARGE, SD3_MEDIUM)
        if config.hidden in sizes and (config.num_dual_layers or not dual)
    ]
    return fitting[0] if len(fitting) == 1 else None
