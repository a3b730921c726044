"""The entry point: chooses what runs, and shares it over a mesh."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from taca_jax.attention.pallas_tpu.target import device_kind
from taca_jax.attention.pallas_tpu.tiles import heads_per_column
from taca_jax.nn.layers import RMSNorm
from taca_jax.nn.norm_rotate import pallas_tpu, reference
from taca_jax.nn.rope import Rotation
from taca_jax.parallel.mesh import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS, dividing_axes

Implementation = Literal["auto", "reference", "pallas", "pallas_interpret"]


def norm_rotate(
    parts: Sequence[Float[Array, "b _ h d"]],
    norms: Sequence[RMSNorm],
    rotation: Rotation | None = None,
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "b s h d"]:
    """The parts of a joint sequence one after the other: each normalised per head by its own norm,
    then rotated by its positions in the sequence.

    Computed in float32, and rounded to the parts' dtype after the norm and after the rotation.
    `rotation` is of the whole sequence and has no gradient; None leaves it out. `auto` takes the
    kernel on TPUs (over the mesh that is set) and `reference` elsewhere, and where heads do not
    fill columns of 128 lanes or tokens do not divide over the devices that share them.
    `pallas_interpret` runs the kernel anywhere, slowly.
    """
    on_tpu = device_kind().startswith("TPU")
    if implementation == "reference" or (
        implementation == "auto" and not (on_tpu and _fits(parts))
    ):
        return reference.norm_rotate(parts, norms, rotation)
    scales = [norm.scale[...] for norm in norms]
    ends = np.cumsum([0, *(part.shape[1] for part in parts)])
    rotations = [
        None
        if rotation is None
        else jax.tree.map(lambda x, i=i: x[ends[i] : ends[i + 1]], rotation)
        for i in range(len(parts))
    ]
    epsilons = [norm.epsilon for norm in norms]
    interpret = implementation == "pallas_interpret"
    return _over_mesh(parts, scales, rotations, epsilons, interpret)


def _shared_by(axis: str) -> int:
    """How many devices of the mesh that is set are along an axis."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _fits(parts: Sequence[jax.Array]) -> bool:
    """Whether the kernel can run on each device's share of the parts."""
    _, _, heads, head_dim = parts[0].shape
    if heads % _shared_by(TENSOR_AXIS):
        return False
    if any(part.shape[1] % _shared_by(CONTEXT_AXIS) for part in parts):
        return False
    return heads_per_column(heads // _shared_by(TENSOR_AXIS), head_dim) is not None


def _over_mesh(
    parts: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    rotations: Sequence[Rotation | None],
    epsilons: Sequence[float],
    interpret: bool,
) -> jax.Array:
    """The kernel, with each device of the mesh that is set doing its share."""
    mesh = jax.sharding.get_abstract_mesh()
    run = partial(pallas_tpu.norm_rotate, interpret=interpret)
    # Within somebody's shard_map this is one device's share already.
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return run(parts, scales, rotations, epsilons=tuple(epsilons))
    batch = dividing_axes(mesh, BATCH_AXES, parts[0].shape[0])
    context, head = (axis if _shared_by(axis) > 1 else None for axis in (CONTEXT_AXIS, TENSOR_AXIS))
    tokens = P(batch, context, head, None)

    def share(each: slice) -> jax.Array:
        """Of some of the parts."""
        # check_vma needs to know over which axes results vary, which Pallas calls do not say.
        return jax.shard_map(
            partial(run, epsilons=tuple(epsilons[each])),
            mesh=mesh,
            in_specs=(tokens, P(), P(context)),
            out_specs=tokens,
            check_vma=False,
        )(list(parts[each]), list(scales[each]), list(rotations[each]))

    if context is None:
        return share(slice(None))
    # A device's shares of the parts are not neighbours in the joint sequence.
    return reference.join([share(slice(i, i + 1)) for i in range(len(parts))])
