"""The axes of a mesh of devices by name, and what stands where on it.

`data` and `fsdp` share the samples; `fsdp` shares parameters too, gathered where they are used;
`context` shares the tokens of each sample; `tensor` shares heads and the MLPs' hidden channels.
Whoever runs a model sets the mesh (`on`); models only say here where activations belong.
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
"""Ordered from least to most communication between neighbours."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share the work along each axis; the product is the number of devices.

    One of them may be -1, which is as many devices as the others leave. On one device nothing is
    shared, whatever stands here.

    data: shares the samples; parameters are whole on each.
    fsdp: shares the samples and the parameters. 0 is the devices that the others leave; in training
        `data` gets those where they have room for whole parameters (`training.mesh_choice`).
    context: shares the tokens of each sample.
    tensor: shares heads and the MLPs' hidden channels; divides the number of heads.
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
        """Whether parameters may be shared or not."""
        return self.fsdp == 0 and self.data == 1 and -1 not in (self.context, self.tensor)

    def _asked(self) -> dict[str, int]:
        others = (self.data, self.context, self.tensor)
        asked = {
            "data": self.data,
            "fsdp": self.fsdp or (1 if -1 in others else -1),
            "context": self.context,
            "tensor": self.tensor,
        }
        return {axis: asked[axis] for axis in AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis. Raises UserError where `devices` cannot be shared so."""
        sizes = self._asked()
        known = int(np.prod([size for size in sizes.values() if size != -1]))
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        if -1 in sizes.values():
            if devices % known:
                raise UserError(f"{asked}: {known} does not divide the {devices} devices")
            return {axis: devices // known if n == -1 else n for axis, n in sizes.items()}
        if known != devices:
            raise UserError(f"{asked}: that is {known} devices, and there are {devices}")
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `devices` (by default all) that `config` asks for, near devices side by side.

    Raises UserError as `MeshConfig.sizes` does.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def on(mesh: Mesh | None) -> AbstractContextManager[object]:
    """Within it, `mesh` is set; None leaves everything as it is."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def dividing_axes(
    mesh: Mesh | AbstractMesh, axes: tuple[str, ...], size: int
) -> tuple[str, ...] | None:
    """Those of `axes`, in order, over which `size` divides evenly; None where it is over none."""
    found: tuple[str, ...] = ()
    for axis in axes:
        parts = mesh.shape.get(axis, 1)
        if parts > 1 and size % parts == 0:
            found += (axis,)
            size //= parts
    return found or None


def constrain_tokens(x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """`x` with samples and tokens shared over the mesh that is set, and whole channels."""
    mesh = jax.sharding.get_abstract_mesh()
    # Within somebody's shard_map the axes are spent.
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    batch = dividing_axes(mesh, BATCH_AXES, x.shape[0])
    tokens = dividing_axes(mesh, (CONTEXT_AXIS,), x.shape[1])
    return jax.lax.with_sharding_constraint(x, P(batch, tokens, None))
