"""The axes of a mesh of devices by name, and what stands where on it.

`data` and `fsdp` share the samples; `fsdp` shares parameters too, gathered where they are used;
`context` shares the tokens of each sample; `tensor` shares heads and the MLPs' hidden channels.
Whoever runs a model sets the mesh (`on`); models only say here where activations belong.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp")
CONTEXT_AXIS = "context"
TENSOR_AXIS = "tensor"
AXES = (*BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS)
"""From those that speak least with one another to those that speak most."""


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
