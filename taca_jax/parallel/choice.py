"""Whether devices share a model's parameters, where the configuration leaves that open.

What is shared is gathered in every block. v5e's compiler hides that behind arithmetic, v5p's does
not; where parameters have room whole, only the gradients of what is trained are on the wires.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from taca_jax.parallel.chips import Chip, chip_of
from taca_jax.parallel.mesh import MeshConfig, make_mesh

WHOLE_SHARE = 0.4
"""Of a device's memory that whole parameters may take: the rest is for the samples."""


def choose_mesh(
    config: MeshConfig, devices: Sequence[Any], parameter_bytes: Callable[[Any], int]
) -> Mesh:
    """The mesh of a run on `devices`, whose parameters are `parameter_bytes(device)` on one.

    Raises UserError as `make_mesh` does.
    """
    chip = chip_of(devices[0].device_kind)
    if chip is not None and len(devices) > 1:
        config = settled(config, chip, lambda: parameter_bytes(devices[0]))
    return make_mesh(config, devices)


def settled(config: MeshConfig, chip: Chip, parameter_bytes: Callable[[], int]) -> MeshConfig:
    """`config`, and what it leaves open as the memory of a chip asks."""
    if config.open and parameter_bytes() <= WHOLE_SHARE * chip.memory * config.tensor:
        return dataclasses.replace(config, data=-1, fsdp=1)
    return config
