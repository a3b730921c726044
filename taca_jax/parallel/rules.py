"""The sharding of parameters, from the sharding table of a kind of model.

A table maps layers, by regular expression, to the mesh axes over which the inputs and the outputs
of their kernels are split. The other parameters follow: a bias is split over `tensor` if its
kernel's outputs are; LoRA's A is split as the inputs and B as the outputs, both over `fsdp` too, as
are the scales of a quantised kernel; the layer axis of stacked blocks is never split. What is split
over `fsdp` is gathered where it is used, layer by layer (`gather`).
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from taca_jax.parallel.mesh import TENSOR_AXIS, dividing_axes

Axes = tuple[str, ...]
_FSDP = "fsdp"
FSDP: Axes = (_FSDP,)
TENSOR: Axes = (TENSOR_AXIS,)
WHOLE: Axes = ()
IN = (FSDP, TENSOR)  # from the hidden channels to heads, MLPs and modulations
OUT = (TENSOR, FSDP)  # and back to the hidden channels
EMBEDDING = (WHOLE, (TENSOR_AXIS, _FSDP))

ShardingTable = Mapping[str, tuple[Axes, Axes]]
"""Regular expression of a layer's path -> the mesh axes of its kernel's inputs and outputs."""

_NORMS = r"(.*\.)?\w*norm\w*"


def parameter_spec(
    table: ShardingTable, path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> P:
    """The PartitionSpec of one parameter, given its dotted path and the table of its model's kind.

    Dimensions that do not divide evenly over an axis are not split over it. Raises LookupError,
    since the table is wrong, unless exactly one line of the table matches the parameter.
    """
    layer, _, name = path.rpartition(".")
    if name == "scale" or re.fullmatch(_NORMS, layer):
        return P()
    matching = [axes for pattern, axes in table.items() if re.fullmatch(pattern, layer)]
    if len(matching) != 1:
        raise LookupError(f"{len(matching)} lines of the sharding table are about {path}")
    ((inputs, outputs),) = matching
    sides = {
        "kernel": (inputs, outputs),
        "embedding": (inputs, outputs),
        # There are few blocks of inputs, so that fsdp splits the outputs instead.
        "kernel_scale": (tuple(axis for axis in inputs if axis != _FSDP), _with_fsdp(outputs)),
        "bias": (outputs if outputs == TENSOR else WHOLE,),
        "lora_a": (_with_fsdp(inputs), WHOLE),
        "lora_b": (WHOLE, _with_fsdp(outputs)),
    }[name]
    ours = shape[len(shape) - len(sides) :]
    found = [dividing_axes(mesh, axes, size) for axes, size in zip(sides, ours, strict=True)]
    return P(*[None] * (len(shape) - len(sides)), *found)


def _with_fsdp(axes: Axes) -> Axes:
    """A LoRA factor has one long dimension, and three more arrays of its shape in the optimizer, so
    that it is split over `fsdp` in any case."""
    return axes if _FSDP in axes else (*axes, _FSDP)


def parameter_sharding(
    table: ShardingTable, path: str, shape: Sequence[int], mesh: Mesh | None
) -> Sharding:
    """`parameter_spec` as a sharding; without a mesh the first device. Raises as it does."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, parameter_spec(table, path, shape, mesh))


def are_gathered() -> bool:
    """Whether parameters are split over `fsdp` on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside a shard_map an array is already one device's shard.
    return not mesh.empty and mesh.shape.get(_FSDP, 1) > 1 and not mesh.manual_axes


def gather(table: ShardingTable, path: str, parameter: jax.Array) -> jax.Array:
    """One layer's parameter, to be used: each device has all of what `fsdp` splits of it, and its
    gradient is split again as it arises. `path` and raises: as `parameter_spec`.

    Left to itself XLA's partitioner turns gathering and product into a loop over the pieces, which
    on TPUs reads and writes the whole output in each turn: three times a step's memory traffic.
    """
    if not are_gathered():
        return parameter
    mesh = jax.sharding.get_abstract_mesh()
    sizes = tuple(1 if axis == _FSDP else size for axis, size in mesh.shape.items())
    without_fsdp = AbstractMesh(sizes, mesh.axis_names)
    split, whole = (
        parameter_spec(table, path, parameter.shape, each) for each in (mesh, without_fsdp)
    )
    if not jnp.issubdtype(parameter.dtype, jnp.floating):  # codes, which have no gradient
        return jax.lax.with_sharding_constraint(parameter, whole)
    return _gathered(parameter, split, whole)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(parameter: jax.Array, split: P, whole: P) -> jax.Array:
    del split
    return jax.lax.with_sharding_constraint(parameter, whole)


def _split_gradient(split: P, whole: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Whole first: the product that makes it would be a loop over the pieces too. Of the sum over
    # devices and its part the compiler makes one operation.
    gradient = jax.lax.with_sharding_constraint(gradient, whole)
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(
    lambda parameter, split, whole: (_gathered(parameter, split, whole), None), _split_gradient
)
