"""LoRA files of XLabs-AI/x-flux: `double_blocks.0.processor.qkv_lora1.down.weight`.

The factors belong to processors of the attention: 1 is the image's, 2 the text's; those of the
single blocks have no number. q, k and v are one layer, the single blocks' without the MLP.
"""

from taca_jax.formats.key_table import Table, fused_linear, linear
from taca_jax.formats.lora.dialect import Dialect

_DOUBLE, _SINGLE = "double_blocks.{layer}.processor", "single_blocks.{layer}.processor"


def _fused(theirs: str, ours: str):
    return fused_linear(theirs, *(f"{ours}.{x}" for x in "qkv"))


FLUX = Dialect(
    "XLabs",
    Table(
        "a FLUX transformer in XLabs' names",
        (
            *_fused(f"{_DOUBLE}.qkv_lora1", "double_blocks.img.qkv"),
            *linear(f"{_DOUBLE}.proj_lora1", "double_blocks.img.out"),
            *_fused(f"{_DOUBLE}.qkv_lora2", "double_blocks.txt.qkv"),
            *linear(f"{_DOUBLE}.proj_lora2", "double_blocks.txt.out"),
            *_fused(f"{_SINGLE}.qkv_lora", "single_blocks.qkv"),
            *linear(f"{_SINGLE}.proj_lora", "single_blocks.out"),
        ),
    ),
    ("diffusion_model.", ""),
)
