"""Which block sizes are fastest on which chip.

The table was searched with `python -m benchmarks.attention_tpu --search`, which counts the cycles
of the program that the TPU compiler schedules. Nothing but speed depends on it.
"""

from dataclasses import dataclass

import jax
from jax.typing import DTypeLike

from taca_jax.attention.pallas_tpu.tiles import Blocks


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of the forward and the backward kernel."""

    forward: Blocks
    backward: Blocks


@dataclass(frozen=True)
class Chip:
    """A generation of TPU. vmem_limit: bytes of VMEM that a kernel may use."""

    name: str
    vmem_limit: int


V5E = Chip("v5e", 100 * 2**20)
V6E = Chip("v6e", 100 * 2**20)
V5P = Chip("v5p", 56 * 2**20)

_KINDS = {
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
}
_OTHER = Chip("another TPU", 12 * 2**20)
"""Sizes that any generation has room for: v4 has 16 MiB."""

_NARROW = BlockSizes(Blocks(768, 256), Blocks(256, 256))
"""For matrix units of 128 x 128: v5e and v5p."""

_WIDE = BlockSizes(Blocks(768, 256), Blocks(256, 256, prefetch=2, transposed=True))
"""For matrix units of 256 x 256: v6e."""


def default_blocks(chip: Chip, head_dim: int, dtype: DTypeLike) -> BlockSizes:
    """The table's sizes for a chip and a head size."""
    del head_dim, dtype
    return _WIDE if chip == V6E else _NARROW


def this_chip() -> Chip:
    """The chip that is compiled for: of the mesh that is set, else of this machine."""
    kind = device_kind()
    return _KINDS.get(kind, _OTHER if kind.startswith("TPU") else V5E)


def device_kind() -> str:
    """The kind of the devices of the mesh that is set (which may be elsewhere), or of this one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
