"""Joint attention on a mesh: samples and heads apart, and queries apart where images are large.

XLA cannot see into a kernel, so what each device computes is said here, by the names of the mesh's
axes (`parallel.mesh`): samples over `data` and `fsdp`, heads over `tensor`, the joint sequence's
queries over `context`. Other axes' devices repeat the work of their neighbours.

With `context`, keys and values are gathered rather than passed around a ring. A head's keys and
values are 2.4 MB at FLUX's 4608 tokens, which VMEM holds whole (the kernel wants them so: no
rescaling between pieces of a ring), and XLA runs the gathering beside the projections before it; in
the backward pass, the sum of keys' gradients becomes a reduce-scatter.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from taca_jax.parallel.mesh import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS, dividing_axes


def over_mesh(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` with each device of the mesh that is set doing its part.

    `attend(q, k, v, *, text_len, gamma, first_query)` is what one device runs: q may be a part of
    the sequence. Raises ValueError where the heads do not divide over `tensor`.
    """

    def joint_attention(
        q: Float[Array, "b s h d"],
        k: Float[Array, "b s h d"],
        v: Float[Array, "b s h d"],
        *,
        text_len: int,
        gamma: Float[Array, " b"],
    ) -> Float[Array, "b s h d"]:
        mesh = jax.sharding.get_abstract_mesh()
        # Within somebody's shard_map the axes are spent: this is one device's part already.
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return attend(q, k, v, text_len=text_len, gamma=gamma)
        batch = dividing_axes(mesh, BATCH_AXES, q.shape[0])
        head = TENSOR_AXIS if mesh.shape.get(TENSOR_AXIS, 1) > 1 else None
        if head and q.shape[2] % mesh.shape[head]:
            raise ValueError(
                f"{q.shape[2]} heads do not divide over the mesh's {mesh.shape[head]} devices of "
                f"axis {head!r}; make that axis a divisor"
            )
        parts = mesh.shape.get(CONTEXT_AXIS, 1)
        context = CONTEXT_AXIS if parts > 1 else None
        length = q.shape[1]
        q = jnp.pad(q, ((0, 0), (0, -length % parts), (0, 0), (0, 0)))

        def local(q: jax.Array, k: jax.Array, v: jax.Array, gamma: jax.Array) -> jax.Array:
            first = 0 if context is None else jax.lax.axis_index(context) * q.shape[1]
            return attend(q, k, v, text_len=text_len, gamma=gamma, first_query=first)

        queries, keys = P(batch, context, head, None), P(batch, None, head, None)
        # Pallas calls do not say over which axes their results vary: nothing could be checked.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(queries, keys, keys, P(batch)),
            out_specs=queries,
            check_vma=False,
        )(q, k, v, gamma)[:, :length]

    return joint_attention
