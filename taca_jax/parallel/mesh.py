"""Meshes of devices with named axes, and the sharding of activations over them.

Samples are split over `data` and `fsdp`; parameters over `fsdp` (and gathered where they are used);
the tokens of each sample over `context`; attention heads and the MLPs' hidden channels over
`tensor`. The caller of a model sets the mesh (`on`); models constrain their activations to it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from taca_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")
CONTEXT_AXIS = "context"
TENSOR_AXIS = "tensor"
AXES = (*BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS)
"""All axes, from the one with the least communication to the one with the most."""


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis of the mesh.

    Their product is the number of devices; one axis may be -1, which takes all that the others
    leave. The default works for any number of devices, including one.

    data: splits the samples; each device has all parameters.
    fsdp: splits the samples and the parameters. 0 takes the devices that the other axes leave; in
      training they go to `data` instead if all parameters fit each device (`parallel.choice`).
    context: splits the tokens of each sample.
    tensor: splits heads and the MLPs' hidden channels; divides the number of heads.

    Raises UserError for other numbers below 1, and for more than one -1.
    """

    data: int = 1
    fsdp: int = 0
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = self._asked()
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                least = "0 (open)" if axis == "fsdp" else "1"
                raise UserError(
                    f"mesh.{axis} is {size}; it must be {least} or more, or -1 for the rest"
                )
        if list(sizes.values()).count(-1) > 1:
            raise UserError("only one axis of mesh may be -1, the devices that the others leave")

    @property
    def open(self) -> bool:
        """Whether the configuration leaves open if parameters are sharded."""
        return self.fsdp == 0 and self.data == 1 and -1 not in (self.context, self.tensor)

    def _asked(self) -> dict[str, int]:
        """Devices along each axis, -1 for the axis that takes all that the others leave."""
        others = (self.data, self.context, self.tensor)
        asked = {
            "data": self.data,
            "fsdp": self.fsdp or (1 if -1 in others else -1),
            "context": self.context,
            "tensor": self.tensor,
        }
        return {axis: asked[axis] for axis in AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """The number of devices along each axis of a mesh of `devices`.

        Raises UserError if the axes need another number of devices.
        """
        sizes = self._asked()
        known = int(np.prod([size for size in sizes.values() if size != -1]))
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        change = "change one, or leave all out"
        if -1 in sizes.values():
            if devices % known:
                there = "the 1 device" if devices == 1 else f"the {devices} devices"
                raise UserError(f"{asked}: {known} does not divide {there}; {change}")
            return {axis: devices // known if n == -1 else n for axis, n in sizes.items()}
        if known != devices:
            there = "is 1" if devices == 1 else f"are {devices}"
            raise UserError(f"{asked}: that is {known} devices, and there {there}; {change}")
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices`, by default all.

    Devices that are physically near each other are neighbours on the mesh. Raises UserError as
    `MeshConfig.sizes` does.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_heads(mesh: Mesh | None, heads: int) -> None:
    """Raises UserError unless a transformer's heads divide over the mesh."""
    parts = 1 if mesh is None else mesh.shape[TENSOR_AXIS]
    if heads % parts:
        raise UserError(
            f"mesh.tensor is {parts}; the transformer's {heads} heads do not divide over it"
        )


def on(mesh: Mesh | None) -> AbstractContextManager[object]:
    """A context in which `mesh` is the current mesh; None changes nothing."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def dividing_axes(
    mesh: Mesh | AbstractMesh, axes: tuple[str, ...], size: int
) -> tuple[str, ...] | None:
    """Those of `axes`, in order, over which a dimension of `size` divides evenly; None if none."""
    found: tuple[str, ...] = ()
    for axis in axes:
        parts = mesh.shape.get(axis, 1)
        if parts > 1 and size % parts == 0:
            found += (axis,)
            size //= parts
    return found or None


def constrain_tokens(x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """Shards samples and tokens over the current mesh, where they divide evenly; not channels."""
    return _constrained(x, BATCH_AXES, (CONTEXT_AXIS,), ())


def constrain_vectors(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Shards samples over the current mesh, where they divide evenly; not channels.

    For modulation vectors. Without it XLA's partitioner (jax 0.10.2) splits them over `tensor`, and
    slices of them had wrong values on a mesh of data 2, fsdp 2 and tensor 2.
    """
    return _constrained(x, BATCH_AXES, ())


def constrain_samples(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Shards samples over the current mesh, where they divide evenly, and nothing else."""
    return _constrained(x, BATCH_AXES, (), (), ())


def _constrained(x: Array, *axes: tuple[str, ...]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    # Inside a shard_map the array is already one device's shard.
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    parts = (dividing_axes(mesh, each, n) for each, n in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, P(*parts))
