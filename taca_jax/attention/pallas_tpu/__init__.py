"""TACA joint attention for TPU in Pallas: `op` is what to call, `forward` and `backward` are the
kernels, `tiles` is what they share, `blocks` how large their pieces are."""

from taca_jax.attention.pallas_tpu.blocks import BlockSizes, device_kind
from taca_jax.attention.pallas_tpu.op import joint_attention, joint_attention_with_log_sums
from taca_jax.attention.pallas_tpu.tiles import Blocks

__all__ = [
    "BlockSizes",
    "Blocks",
    "device_kind",
    "joint_attention",
    "joint_attention_with_log_sums",
]
