"""Which block sizes are fastest on which chip.

Chosen by the cycles of the program that the TPU compiler schedules, as
`python -m benchmarks.attention_tpu --search` counts them. Only speed and memory depend on them.
"""

from dataclasses import dataclass

from taca_jax.attention.pallas_tpu.tiles import LANES, Blocks
from taca_jax.parallel.chips import Chip


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of the forward and the backward kernel."""

    forward: Blocks
    backward: Blocks


_SMALL_MATRIX_UNIT = BlockSizes(
    Blocks(768, 128, per_step=2, unroll=36), Blocks(384, 256, per_step=2)
)
"""For matrix units of 128 x 128: v5e, v5p, and what is not known."""

_SMALL_MATRIX_UNIT_V4 = BlockSizes(
    Blocks(384, 128, per_step=4, unroll=36), Blocks(384, 128, per_step=2, unroll=36)
)
"""For v4, where larger tiles spill more registers."""

_LARGE_MATRIX_UNIT = BlockSizes(
    Blocks(768, 256, per_step=2), Blocks(256, 256, per_step=3, prefetch=2, transposed=True)
)
"""For matrix units of 256 x 256: v6e."""

_SMALL_MATRIX_UNIT_PAIRED = BlockSizes(Blocks(512, 256), Blocks(256, 256))
_LARGE_MATRIX_UNIT_PAIRED = BlockSizes(
    Blocks(768, 256, per_step=2), Blocks(256, 256, per_step=2, prefetch=2, transposed=True)
)
"""For heads of less than 128 channels, which share a column of lanes: a tile's code is repeated for
each of them."""


def default_blocks(chip: Chip | None, head_dim: int) -> BlockSizes:
    """The fastest sizes for a chip (None: one that is not known) and a head size."""
    paired = head_dim < LANES
    match chip and chip.name:
        case "v6e":
            return _LARGE_MATRIX_UNIT_PAIRED if paired else _LARGE_MATRIX_UNIT
        case "v4":
            return _SMALL_MATRIX_UNIT_PAIRED if paired else _SMALL_MATRIX_UNIT_V4
        case _:
            return _SMALL_MATRIX_UNIT_PAIRED if paired else _SMALL_MATRIX_UNIT
