"""Chooses a mesh, where the configuration leaves open whether parameters are sharded.

In training, sharded parameters are gathered in every block. Replicated parameters, where they fit,
need only the gradients of the trained parameters to be communicated.

In drawing there are few samples, often one: what is left of the devices splits each picture.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from taca_jax.parallel.chips import Chip, chip_of
from taca_jax.parallel.mesh import MeshConfig, make_mesh

WHOLE_SHARE = 0.4
"""The share of a device's memory that replicated parameters may take in training; the rest is for
samples."""

DRAWING_SHARE = 0.75
"""The share of a device's memory that the parameters in it may take in drawing. On v5e the rest is
4.3 GB: FLUX.1 takes 1.5 GB beside its parameters for a picture of 1024 px, decoding included."""


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


@dataclass(frozen=True)
class Place:
    """Where a pipeline draws: the mesh (None: the first device), and whether its models take turns
    in memory."""

    mesh: Mesh | None
    stages: bool


def choose_place(
    meshes: Sequence[Mesh | None],
    model_bytes: Callable[[Mesh | None], Mapping[str, int]],
    *,
    stages: bool | None = None,
) -> Place:
    """The first of `meshes` on which a pipeline's models fit, or the last.

    model_bytes: what each device of a mesh would hold of each model. stages: whether the models
    take turns; None leaves it open, and prefers all of them in memory. Where the size of the
    devices' memory is not known, all are in memory, on the second mesh if there is one.
    """
    memory = memory_of(_first_device(meshes[0]))
    if memory is None:
        return Place(meshes[min(1, len(meshes) - 1)], bool(stages))
    for staged in (False, True) if stages is None else (stages,):
        for mesh in meshes:
            sizes = model_bytes(mesh).values()
            if (max(sizes) if staged else sum(sizes)) <= DRAWING_SHARE * memory:
                return Place(mesh, staged)
    return Place(meshes[-1], stages is not False)


def drawing_meshes(
    config: MeshConfig, devices: int, samples: int, heads: int
) -> tuple[MeshConfig, ...]:
    """The meshes for drawing `samples` at a time: `config` alone, if it is not open, and otherwise
    from the one with the least communication to the one with the least of the parameters on each
    device.

    As many devices as divide the samples evenly take different samples. The others share each
    sample: its tokens, if every device has all parameters; and otherwise its heads, as far as they
    divide, or in the last mesh the parameters alone.
    """
    given = config.context * config.tensor
    if not config.open or devices % given:
        return (config,)
    split = math.gcd(devices // given, samples)
    rest = devices // given // split
    heads_split = math.gcd(rest, heads // config.tensor)
    whole = dataclasses.replace(config, data=split, fsdp=1, context=config.context * rest)
    shared = dataclasses.replace(
        config,
        fsdp=split,
        tensor=config.tensor * heads_split,
        context=config.context * rest // heads_split,
    )
    spread = dataclasses.replace(shared, fsdp=split * rest // heads_split, context=config.context)
    return tuple(dict.fromkeys((whole, shared, spread)))


def _first_device(mesh: Mesh | None) -> Any:
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def memory_of(device: Any) -> float | None:
    """Bytes of a device's memory; None where that is not known, as on CPUs.

    Other devices than TPUs say it themselves, in a single process; several need not say the same.
    """
    chip = chip_of(device.device_kind)
    if chip is not None:
        return chip.memory
    if jax.process_count() > 1:
        return None
    return (device.memory_stats() or {}).get("bytes_limit")
