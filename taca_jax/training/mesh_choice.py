"""Whether a run's devices share its parameters, where the configuration leaves that open.

What is shared is gathered in every block. v5e's compiler hides that behind arithmetic, v5p's does
not; where parameters have room whole, only the gradients of what is trained are on the wires.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from taca_jax.nn.layers import LoRAParam
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.planning.slices import Chip, chip_of
from taca_jax.training.abstract import abstract_training, local_bytes, part_configs
from taca_jax.training.config import TrainConfig

WHOLE_SHARE = 0.4
"""Of a device's memory that whole parameters may take: the rest is for the samples."""

OPTIMIZER_COPIES = 4
"""Arrays of the size of what is trained, at most: its gradient, two moments, an average."""


def choose_mesh(config: TrainConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of a run on `devices`.

    Raises UserError as `make_mesh` does and, of a base that training cannot use, `part_configs`.
    """
    chip = chip_of(devices[0].device_kind)
    if chip is None or len(devices) == 1:
        return make_mesh(config.mesh, devices)
    return make_mesh(settled(config, chip, devices[0]), devices)


def settled(config: TrainConfig, chip: Chip, device: Any) -> MeshConfig:
    """`config.mesh`, and what that leaves open as the memory of a chip asks."""
    mesh = config.mesh
    if mesh.open and parameter_bytes(config, device) <= WHOLE_SHARE * chip.memory * mesh.tensor:
        return dataclasses.replace(mesh, data=-1, fsdp=1)
    return mesh


def parameter_bytes(config: TrainConfig, device: Any) -> int:
    """Bytes of all parameters that the run has in memory at a time, and of what comes with those
    that it trains. `device` is any one, for shapes to have a place.
    """
    mesh = make_mesh(MeshConfig(), [device])
    parts, text_length = part_configs(config)
    model, autoencoder = abstract_training(config, parts, text_length, mesh)
    transformer = local_bytes(nnx.state(model.transformer))
    encoders = local_bytes(nnx.state([model.text_encoder, autoencoder]))
    trained = nnx.state(model, nnx.Param if config.lora is None else LoRAParam)
    stepping = transformer + OPTIMIZER_COPIES * local_bytes(trained)
    if config.data.encode == "cache":  # they encode before the transformer is there
        return max(stepping, encoders)
    return stepping + encoders
