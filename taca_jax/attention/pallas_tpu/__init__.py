"""TACA joint attention for TPU in Pallas.

`op` is what to call, `forward` and `backward` are the kernels, and `tiles` is what they share.
`blocks` has the fastest block sizes of each chip, `vmem` such as fit, `target` is the chip.
"""

from taca_jax.attention.pallas_tpu.blocks import BlockSizes
from taca_jax.attention.pallas_tpu.op import (
    joint_attention,
    joint_attention_with_log_sums,
    planned,
)
from taca_jax.attention.pallas_tpu.target import device_kind
from taca_jax.attention.pallas_tpu.tiles import Blocks
from taca_jax.attention.pallas_tpu.vmem import Direction, NoRoomError

__all__ = [
    "BlockSizes",
    "Blocks",
    "Direction",
    "NoRoomError",
    "device_kind",
    "joint_attention",
    "joint_attention_with_log_sums",
    "planned",
]
