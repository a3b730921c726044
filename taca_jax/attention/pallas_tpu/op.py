"""The Pallas kernels as one differentiable operation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from taca_jax.attention.log_sums import LogSums
from taca_jax.attention.pallas_tpu.backward import backward
from taca_jax.attention.pallas_tpu.blocks import BlockSizes, Chip, default_blocks, this_chip
from taca_jax.attention.pallas_tpu.forward import Sums, forward
from taca_jax.attention.pallas_tpu.tiles import LOG2_E, Blocks, Problem, heads_per_column


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
    """As `reference.joint_attention`, on TPU, in float32 inside; gamma has a gradient too.

    q may be a part of the sequence, which begins at position `first_query` of it. `blocks` are the
    kernel's sizes; None takes the chip's table. `interpret` runs it anywhere, slowly.

    Raises ValueError where a head's keys and values do not fit into VMEM.
    """
    static = _static(q, k, text_len, blocks, interpret)
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
    first_query: Int[Array, ""] | int = 0,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b q h d"], LogSums]:
    """`joint_attention` and, from the same pass, the softmax's sums; without a gradient."""
    static = _static(q, k, text_len, blocks, interpret)
    q, k, v, gamma = _merge(static, q, k, v, gamma)
    first = jnp.asarray(first_query, jnp.int32).reshape(1)
    out, high, *logs = _forward(q, k, v, gamma, first, static, "all and text")
    sums = (((high + log) / LOG2_E).reshape(-1, static.heads, static.queries) for log in logs)
    return _split(static, out), LogSums(*sums)


class _Static(NamedTuple):
    """What a call is compiled for."""

    heads: int
    head_dim: int
    queries: int
    keys: int
    text_len: int
    blocks: BlockSizes
    chip: Chip
    interpret: bool

    @property
    def group(self) -> int | None:
        """Heads of a column of lanes; None where each head is to be a sample of its own."""
        return heads_per_column(self.heads, self.head_dim)

    def problem(self, blocks: Blocks) -> Problem:
        return Problem(
            queries=self.queries,
            keys=self.keys,
            text_len=self.text_len,
            head_dim=self.head_dim,
            group=self.group or 1,
            blocks=blocks,
            vmem_limit=self.chip.vmem_limit,
        )


def _static(
    q: jax.Array, k: jax.Array, text_len: int, blocks: BlockSizes | None, interpret: bool
) -> _Static:
    _, queries, heads, head_dim = q.shape
    chip = this_chip()
    static = _Static(
        heads=heads,
        head_dim=head_dim,
        queries=queries,
        keys=k.shape[1],
        text_len=text_len,
        blocks=blocks or default_blocks(chip, head_dim),
        chip=chip,
        interpret=interpret,
    )
    needed = 4 * static.problem(static.blocks.forward).key_bytes(q.dtype.itemsize)
    if needed > chip.vmem_limit and not interpret:
        raise ValueError(
            f"{k.shape[1]} keys of head size {head_dim} in {q.dtype} need {needed / 2**20:.0f} MiB "
            f"of VMEM, of which {chip.vmem_limit / 2**20:.0f} MiB are there on {chip.name}; shard "
            "the image tokens or take implementation='chunked'"
        )
    return static


def _merge(
    static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, gamma: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """[b, s, h, d] as columns of lanes [b, s, h * d], or as [b * h, s, d]."""
    gamma = gamma.astype(jnp.float32)
    if static.group is not None:
        q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
        return q, k, v, gamma
    q, k, v = (x.swapaxes(1, 2).reshape(-1, x.shape[1], static.head_dim) for x in (q, k, v))
    return q, k, v, jnp.repeat(gamma, static.heads)


def _split(static: _Static, out: jax.Array) -> Float[Array, "b q h d"]:
    if static.group is not None:
        return out.reshape(*out.shape[:2], static.heads, static.head_dim)
    return out.reshape(-1, static.heads, *out.shape[1:]).swapaxes(1, 2)


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
    problem = static.problem(static.blocks.forward)
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
    inputs = tuple(x.value for x in (q, k, v, gamma, first_query))
    out, *sums = _forward(*inputs, static, "all")
    # A residual may say something static by being there or not.
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
        problem=static.problem(static.blocks.backward),
        wants_gamma=wants_gamma,
        interpret=static.interpret,
    )


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)
