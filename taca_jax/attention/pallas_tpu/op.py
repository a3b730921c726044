"""The Pallas kernels as one differentiable operation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from taca_jax.attention.keeping import keepable
from taca_jax.attention.log_sums import LogSums
from taca_jax.attention.pallas_tpu.backward import backward
from taca_jax.attention.pallas_tpu.blocks import BlockSizes, default_blocks
from taca_jax.attention.pallas_tpu.forward import Sums, forward
from taca_jax.attention.pallas_tpu.target import this_chip
from taca_jax.attention.pallas_tpu.tiles import LOG2_E, Problem, heads_per_column
from taca_jax.attention.pallas_tpu.vmem import Direction, fitted


def joint_attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
    first_query: Int[Array, ""] | int = 0,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "b q h d"]:
    """As `reference.joint_attention`, on TPU, computed in float32; gamma has a gradient too.

    q may be a part of the sequence, which begins at position `first_query` of it. `blocks` are the
    sizes of both kernels' blocks; None takes the fastest for the chip that fit. `interpret` runs
    the kernels anywhere, slowly.

    Raises NoRoomError, a ValueError, where no blocks, or not those given, fit into VMEM: those of
    the backward pass where a gradient is taken.
    """
    static = _Static.of(q.shape, k.shape[1], text_len, q.dtype, blocks, interpret)
    merged = _merge(static, q, k, v, gamma)
    first = jnp.asarray(first_query, jnp.int32).reshape(1)
    return _split(static, _attention(*merged, first, static))


def joint_attention_with_log_sums(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
    interpret: bool = False,
) -> tuple[Float[Array, "b q h d"], LogSums]:
    """`joint_attention` of all queries and, from the same pass, the sums of its softmax.

    Neither has a gradient. Raises NoRoomError where no blocks fit into VMEM.
    """
    static = _Static.of(q.shape, k.shape[1], text_len, q.dtype, interpret=interpret)
    q, k, v, gamma = _merge(static, q, k, v, gamma)
    first = jnp.zeros(1, jnp.int32)
    out, high, *logs = _forward(q, k, v, gamma, first, static, "all and text")
    sums = (
        ((high + log) / LOG2_E).reshape(-1, static.heads, static.forward.queries) for log in logs
    )
    return _split(static, out), LogSums(*sums)


def planned(
    direction: Direction,
    shape: tuple[int, ...],
    *,
    keys: int,
    text_len: int,
    dtype: jax.typing.DTypeLike,
) -> Problem:
    """What a kernel is compiled for, its blocks chosen, for queries of a shape `[b, q, h, d]`.

    Raises NoRoomError where no blocks fit into VMEM.
    """
    return _Static.of(shape, keys, text_len, dtype).problem(direction)


class _Static(NamedTuple):
    """What a call is compiled for.

    forward, backward: each pass with the blocks that are wanted; `problem` gives those that fit.
    may_shrink: whether smaller blocks may be taken than those.
    """

    heads: int
    forward: Problem
    backward: Problem
    may_shrink: bool = True
    interpret: bool = False

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        keys: int,
        text_len: int,
        dtype: jax.typing.DTypeLike,
        blocks: BlockSizes | None = None,
        interpret: bool = False,
    ) -> "_Static":
        """For queries of a shape `[b, q, h, d]`, with `blocks` exactly, or (None) the chip's."""
        _, queries, heads, head_dim = shape
        chip = this_chip()
        sizes = blocks or default_blocks(chip, head_dim)
        forward, backward = (
            Problem(
                queries=queries,
                keys=keys,
                text_len=text_len,
                head_dim=head_dim,
                group=heads_per_column(heads, head_dim) or 1,
                dtype=jnp.dtype(dtype),
                chip=chip,
                blocks=each,
            )
            for each in (sizes.forward, sizes.backward)
        )
        return cls(heads, forward, backward, may_shrink=blocks is None, interpret=interpret)

    @property
    def separate_heads(self) -> bool:
        """Whether each head is handled as a sample, since heads cannot fill columns of lanes."""
        return heads_per_column(self.heads, self.forward.head_dim) is None

    def problem(self, direction: Direction) -> Problem:
        """A pass with blocks that fit into VMEM. Raises NoRoomError where none do."""
        problem = self.forward if direction == "forward" else self.backward
        if self.interpret:
            return problem
        return fitted(problem, direction, may_shrink=self.may_shrink)


def _merge(
    static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, gamma: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q, k, v as the kernels take them, [b, s, h * d] or [b * h, s, d], and a gamma for each b."""
    gamma = gamma.astype(jnp.float32)
    if static.separate_heads:
        q, k, v = (x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v))
        return q, k, v, jnp.repeat(gamma, static.heads)
    q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    return q, k, v, gamma


def _split(static: _Static, out: jax.Array) -> Float[Array, "b q h d"]:
    if static.separate_heads:
        return out.reshape(-1, static.heads, *out.shape[1:]).swapaxes(1, 2)
    return out.reshape(*out.shape[:2], static.heads, -1)


@partial(jax.jit, static_argnums=(5, 6))
def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gamma: jax.Array,
    first_query: jax.Array,
    static: _Static,
    sums: Sums,
) -> list[jax.Array]:
    problem = static.problem("forward")
    return forward(
        q, k, v, gamma, first_query, problem=problem, sums=sums, interpret=static.interpret
    )


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gamma: jax.Array,
    first_query: jax.Array,
    static: _Static,
) -> jax.Array:
    return _forward(q, k, v, gamma, first_query, static, "none")[0]


def _attention_forward(
    q: Any, k: Any, v: Any, gamma: Any, first_query: Any, static: _Static
) -> tuple[jax.Array, tuple]:
    static.problem("backward")  # raises, where it does not fit, before anything is computed
    inputs = tuple(x.value for x in (q, k, v, gamma, first_query))
    out, *sums = keepable(_forward(*inputs, static, "all"))
    # The residuals must be arrays: an empty tuple says yes, None says no.
    wants_gamma = () if gamma.perturbed else None
    return out, (inputs, out, sums, wants_gamma)


def _attention_backward(static: _Static, residuals: tuple, d_out: Any) -> tuple:
    inputs, out, sums, wants_gamma = residuals
    if isinstance(d_out, jax.custom_derivatives.SymbolicZero):
        d_out = jnp.zeros_like(out)
    dq, dk, dv, *per_query = _backward(*inputs, out, *sums, d_out, static, wants_gamma is not None)
    gamma = inputs[3]
    d_gamma = per_query[0].sum((1, 2, 3)) if per_query else jnp.zeros_like(gamma)
    return dq, dk, dv, d_gamma, np.zeros(1, jax.dtypes.float0)


@partial(jax.jit, static_argnums=(9, 10))
def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gamma: jax.Array,
    first_query: jax.Array,
    out: jax.Array,
    high: jax.Array,
    log_total: jax.Array,
    d_out: jax.Array,
    static: _Static,
    wants_gamma: bool,
) -> list[jax.Array]:
    return backward(
        *(q, k, v, gamma, first_query, out, high, log_total, d_out),
        problem=static.problem("backward"),
        wants_gamma=wants_gamma,
        interpret=static.interpret,
    )


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)
