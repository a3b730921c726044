"""Which block sizes are fastest on which chip.

Chosen by the cycles of the program that the TPU compiler schedules, as
`python -m benchmarks.attention_tpu --search` counts them. Nothing but speed depends on them.
"""

from dataclasses import dataclass

import jax

from taca_jax.attention.pallas_tpu.tiles import LANES, Blocks
from taca_jax.parallel.chips import generation


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

_CHIPS = {chip.name: chip for chip in (V5E, V6E, V5P)}
_OTHER = Chip("another TPU", 12 * 2**20)
"""Sizes that any generation has room for: v4 has 16 MiB."""

_SMALL_MATRIX_UNIT = BlockSizes(
    Blocks(768, 128, per_step=2, unroll=36), Blocks(384, 256, per_step=2)
)
"""128 x 128: v5e and v5p, and what is not known."""

_LARGE_MATRIX_UNIT = BlockSizes(
    Blocks(768, 256, per_step=2), Blocks(256, 256, per_step=3, prefetch=2, transposed=True)
)
"""256 x 256: v6e."""

_SMALL_MATRIX_UNIT_PAIRED = BlockSizes(Blocks(512, 256), Blocks(256, 256))
_LARGE_MATRIX_UNIT_PAIRED = BlockSizes(
    Blocks(768, 256, per_step=2), Blocks(256, 256, per_step=2, prefetch=2, transposed=True)
)
"""Heads of less than 128 share a column of lanes: the code for a tile is twice as long."""


def default_blocks(chip: Chip, head_dim: int) -> BlockSizes:
    """The table's sizes for a chip and a head size."""
    if chip == V6E:
        return _LARGE_MATRIX_UNIT if head_dim >= LANES else _LARGE_MATRIX_UNIT_PAIRED
    return _SMALL_MATRIX_UNIT if head_dim >= LANES else _SMALL_MATRIX_UNIT_PAIRED


def this_chip() -> Chip:
    """The chip that is compiled for: of the mesh that is set, else of this machine."""
    kind = device_kind()
    name = generation(kind)
    if name is None:
        return _OTHER if kind.startswith("TPU") else V5E
    return _CHIPS[name]


def device_kind() -> str:
    """The kind of the devices of the mesh that is set (which may be elsewhere), or of this one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
