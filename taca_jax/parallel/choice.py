"""Chooses whether parameters are sharded, where the configuration leaves that open.

Sharded parameters are gathered in every block. The compiler for v5e overlaps that with compute, the
one for v5p does not. Replicated parameters, where they fit, need only the gradients of the trained
parameters to be communicated.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from taca_jax.parallel.chips import Chip, chip_of
from taca_jax.parallel.mesh import MeshConfig, make_mesh

WHOLE_SHARE = 0.4
"""The share of a device's memory that replicated parameters may take; the rest is for samples."""


def choose_mesh(
    config: MeshConfig, devices: Sequence[Any], parameter_bytes: Callable[[Any], int]
) -> Mesh:
    """The mesh of a run on `devices`; `parameter_bytes(device)` is what a single device would hold.

    Raises UserError as `make_mesh` does.
    """
    chip = chip_of(devices[0].device_kind)
    if chip is not None and len(devices) > 1:
        config = settled(config, chip, lambda: parameter_bytes(devices[0]))
    return make_mesh(config, devices)


def settled(config: MeshConfig, chip: Chip, parameter_bytes: Callable[[], int]) -> MeshConfig:
    """`config` with parameters replicated if it leaves that open and they fit a chip's memory."""
    if config.open and parameter_bytes() <= WHOLE_SHARE * chip.memory * config.tensor:
        return dataclasses.replace(config, data=-1, fsdp=1)
    return config
