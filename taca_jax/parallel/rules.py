"""Which parameter lies where on a mesh: how the sharding table of a kind of model is read.

A table names layers by regular expression and says over which axes the two sides of their kernels
are shared. The rest follows: a bias lies as its kernel's outputs do over `tensor`, LoRA's A as the
inputs and B as the outputs, both over `fsdp` too, as do the scales of a quantised kernel, and the
layer axis of stacked blocks is never shared. `fsdp` stands where a kernel would otherwise be whole
on each device: XLA gathers it, layer by layer, where it is used.
"""

import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from taca_jax.parallel.mesh import TENSOR_AXIS, dividing_axes

Axes = tuple[str, ...]
_FSDP = "fsdp"
FSDP: Axes = (_FSDP,)
TENSOR: Axes = (TENSOR_AXIS,)
WHOLE: Axes = ()
IN = (FSDP, TENSOR)  # from whole channels to those of heads, of MLPs, of modulations
OUT = (TENSOR, FSDP)  # and back
EMBEDDING = (WHOLE, (TENSOR_AXIS, _FSDP))

ShardingTable = Mapping[str, tuple[Axes, Axes]]
"""Layer, a regular expression of its path -> the axes of its kernel's inputs and outputs."""

_NORMS = r"(.*\.)?\w*norm\w*"


def parameter_spec(
    table: ShardingTable, path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> P:
    """Where one parameter of a model lies, by its dotted path and the table of its kind.

    Axes over which its sides do not divide evenly leave it whole. Raises LookupError for a
    parameter that not exactly one line of the table is about: the table is wrong.
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
        # Blocks of inputs are few: what fsdp shares of them are the outputs.
        "kernel_scale": (tuple(axis for axis in inputs if axis != _FSDP), _with_fsdp(outputs)),
        "bias": (outputs if outputs == TENSOR else WHOLE,),
        "lora_a": (_with_fsdp(inputs), WHOLE),
        "lora_b": (WHOLE, _with_fsdp(outputs)),
    }[name]
    ours = shape[len(shape) - len(sides) :]
    found = [dividing_axes(mesh, axes, size) for axes, size in zip(sides, ours, strict=True)]
    return P(*[None] * (len(shape) - len(sides)), *found)


def _with_fsdp(axes: Axes) -> Axes:
    """A factor has one long side, and three more arrays of its shape in the optimizer."""
    return axes if _FSDP in axes else (*axes, _FSDP)


def parameter_sharding(
    table: ShardingTable, path: str, shape: Sequence[int], mesh: Mesh | None
) -> Sharding:
    """`parameter_spec` on a mesh; without one, the first device. Raises as it does."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, parameter_spec(table, path, shape, mesh))
