"""The dialects of LoRA files of Stable Diffusion 3.

Which of our stacks a layer belongs to depends on the config, so each config has its own key tables.
Without a config, all layers go into one placeholder stack, which suffices to rename them.
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
"""q, k, v and out of both streams in the joint attention, as published; not the second attention of
dual blocks."""

PLACEHOLDER_STACK = "any_blocks"
"""A stack that no model has, for layers whose stack is not known."""

_DIFFUSERS = Table(
    "a Stable Diffusion 3 transformer in diffusers' layout",
    tuple(
        rule
        for rule in sd3_diffusers.joint_block(sd3_diffusers.BLOCK, PLACEHOLDER_STACK, dual=True)
        # diffusers swaps its halves in the last block, and a LoRA does not say which is the last.
        if not rule.ours.startswith(f"{PLACEHOLDER_STACK}.txt.mod")
    ),
)
_NATIVE = Table(
    "a Stable Diffusion 3 transformer in Stability AI's layout",
    sd3_native.joint_block(sd3_native.BLOCK, PLACEHOLDER_STACK, dual=True),
)


@cache
def dialects(config: SD3Config | None) -> tuple[Dialect, ...]:
    """The dialects of a model's files, PEFT's first, then kohya's; None if the model is unknown."""
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
    """The only released model that a file can be for; None if there are none or several."""
    sizes = {size for shape in tensors.shapes.values() for size in shape}
    dual = any("attn2" in name or name.startswith("dual_blocks.") for name in tensors.shapes)
    fitting = [
        config
        for config in (SD35_MEDIUM, SD35_LARGE, SD3_MEDIUM)
        if config.hidden in sizes and (config.num_dual_layers or not dual)
    ]
    return fitting[0] if len(fitting) == 1 else None
