"""Joint attention on a mesh: devices share samples and heads and, where images are large, queries.

XLA cannot look into a kernel, so it is said here what each device computes, by the names of the
mesh's axes (`parallel.mesh`): `data` and `fsdp` share the samples, `tensor` the heads, `context`
the queries of the joint sequence. Devices along any other axis repeat their neighbours' work.

With `context`, every device gathers all keys and values instead of passing them around a ring. One
head's are 2.4 MB at FLUX's 4608 tokens and stay in VMEM, where the kernel wants them whole so that
nothing has to be rescaled. XLA overlaps the gathering with the projections before it, and in the
backward pass the sum of the keys' gradients becomes a reduce-scatter.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from taca_jax.parallel.mesh import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS, dividing_axes


class _Layout(NamedTuple):
    """Which axes of a mesh share an attention: its samples, its queries and its heads."""

    mesh: AbstractMesh
    batch: tuple[str, ...] | None
    context: str | None
    head: str | None

    @property
    def queries(self) -> P:
        return P(self.batch, self.context, self.head, None)

    @property
    def keys(self) -> P:
        return P(self.batch, None, self.head, None)

    def devices(self, axes: tuple[str, ...] | str | None) -> int:
        """How many devices there are along some axes."""
        named = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[axis] for axis in named)


def _layout(shape: tuple[int, ...]) -> _Layout | None:
    """For queries `[b, s, h, d]` on the mesh that is set; None where one device does everything.

    Raises ValueError where the heads do not divide over `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Within somebody's shard_map this is one device's part already.
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    batch, _, heads, _ = shape
    tensor, context = (
        axis if mesh.shape.get(axis, 1) > 1 else None for axis in (TENSOR_AXIS, CONTEXT_AXIS)
    )
    if tensor and heads % mesh.shape[tensor]:
        raise ValueError(
            f"{heads} heads do not divide over the mesh's {mesh.shape[tensor]} devices of "
            f"axis {tensor!r}; make that axis a divisor"
        )
    return _Layout(mesh, dividing_axes(mesh, BATCH_AXES, batch), context, tensor)


def is_shared(shape: tuple[int, ...]) -> bool:
    """Whether several devices of the mesh that is set work on queries `[b, s, h, d]`.

    Raises ValueError where the heads do not divide over `tensor`.
    """
    return _layout(shape) is not None


def local_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of queries `[b, s, h, d]`, the part that each device of the mesh that is set works on.

    Raises ValueError where the heads do not divide over `tensor`.
    """
    layout = _layout(shape)
    if layout is None:
        return shape
    batch, length, heads, head_dim = shape
    return (
        batch // layout.devices(layout.batch),
        -(-length // layout.devices(layout.context)),
        heads // layout.devices(layout.head),
        head_dim,
    )


def over_mesh(
    attend: Callable[..., jax.Array], *, whole_sequences: bool = False
) -> Callable[..., jax.Array]:
    """`attend` with each device of the mesh that is set doing its part.

    `attend(q, k, v, *, text_len, gamma, first_query)` is what one device runs: q may be a part of
    the sequence, which begins at position `first_query` of it. With `whole_sequences` it never is
    one: `first_query` is not given, and devices along `context` repeat each other's work.

    Raises ValueError where the heads do not divide over `tensor`.
    """

    def joint_attention(
        q: Float[Array, "b s h d"],
        k: Float[Array, "b s h d"],
        v: Float[Array, "b s h d"],
        *,
        text_len: int,
        gamma: Float[Array, " b"],
    ) -> Float[Array, "b s h d"]:
        layout = _layout(q.shape)
        if layout is None:
            return attend(q, k, v, text_len=text_len, gamma=gamma)
        if whole_sequences:
            layout = layout._replace(context=None)
        context = layout.context
        length = q.shape[1]
        q = jnp.pad(q, ((0, 0), (0, -length % layout.devices(context)), (0, 0), (0, 0)))

        def local(q: jax.Array, k: jax.Array, v: jax.Array, gamma: jax.Array) -> jax.Array:
            if whole_sequences:
                return attend(q, k, v, text_len=text_len, gamma=gamma)
            first = 0 if context is None else jax.lax.axis_index(context) * q.shape[1]
            return attend(q, k, v, text_len=text_len, gamma=gamma, first_query=first)

        # check_vma needs to know over which axes results vary, which Pallas calls do not say.
        return jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(layout.queries, layout.keys, layout.keys, P(layout.batch)),
            out_specs=layout.queries,
            check_vma=False,
        )(q, k, v, gamma)[:, :length]

    return joint_attention
