"""TACA joint attention in plain XLA, a piece of the scores at a time: the CPU's implementation.

Exact (gamma multiplies the float32 logits), differentiable in reverse, and linear in memory: the
backward pass computes each piece's weights again from the softmax's maxima and sums, and adds
gradients of keys and values up (Dao 2023, arXiv 2307.08691, algorithm 2).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from taca_jax.attention.log_sums import LogSums

MAX_SCORES = 2**22
"""Scores held at once, over batch and heads: 16 MiB of float32. Small enough to stay in a CPU's
last cache and under what allocators return to the system at once (a page fault per 4 KiB costs
more than the exponentials); large enough that small models run in one piece."""

PIECES = 16
"""Where they do not fit, scores are done head by head in pieces of MAX_SCORES / PIECES: 1 MiB, what
one core's own cache holds."""


def joint_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
) -> Float[Array, "b s h d"]:
    """As `reference.joint_attention`: any sizes, gamma per sample, float32 softmax."""
    b, s, h, d = q.shape
    # Heads outermost: matrix products over [s, d] slabs are what XLA's CPU backend is fast at; the
    # same einsum over b s h d is several times slower there.
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(b * h, s, d) for x in (q, k, v))
    out: Any = _attention(q, k, v, jnp.repeat(gamma.astype(jnp.float32), h), text_len)
    return out.reshape(b, h, s, d).transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    q: Float[Array, "h s d"],
    k: Float[Array, "h s d"],
    v: Float[Array, "h s d"],
    gamma: Float[Array, " h"],
    text_len: int,
) -> jax.Array:
    return _forward(q, k, v, gamma, text_len)[0]


def _forward(q: Any, k: Any, v: Any, gamma: Any, text_len: int) -> tuple[jax.Array, tuple]:
    """The output; and the inputs, the output and the softmax's maxima and 1 / sums, `[h, s, 1]`."""
    heads, length, _ = q.shape
    group, size = _piece(heads, length)

    def some_heads(q: Any, k: Any, v: Any, gamma: Any) -> tuple[jax.Array, ...]:
        def attend(_: Any, position: Any, q: Any) -> tuple[Any, tuple]:
            factor = _factor(gamma, position, length, text_len, q.shape[-1])
            logits = _product("hqd,hkd->hqk", q, k) * factor
            high = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - high)
            share = 1 / weights.sum(-1, keepdims=True)
            out = _product("hqk,hkd->hqd", weights.astype(v.dtype), v) * share
            return None, (out.astype(q.dtype), high, share)

        return _over_queries(attend, None, size, q)[1]

    out, high, share = _over_heads(some_heads, group, q, k, v, gamma)
    return out, (q, k, v, gamma, out, high, share)


def _backward(text_len: int, saved: tuple, d_out: jax.Array) -> tuple[jax.Array, ...]:
    heads, length, head_dim = d_out.shape
    group, size = _piece(heads, length)

    def some_heads(
        q: Any, k: Any, v: Any, gamma: Any, out: Any, high: Any, share: Any, d_out: Any
    ) -> tuple[jax.Array, ...]:
        mean = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)

        # Scores are transposed here, keys by queries: two products of three then need no turning.
        def add(kept: Any, position: Any, *rows: Any) -> tuple[Any, tuple]:
            q, high, share, mean, d_out = rows
            high, share, mean = (x.swapaxes(1, 2) for x in (high, share, mean))
            factor = _factor(gamma, position, length, text_len, head_dim).swapaxes(1, 2)
            raw = _product("hkd,hqd->hkq", k, q)
            weights = jnp.exp(raw * factor - high) * share
            d_logits = weights * (_product("hkd,hqd->hkq", v, d_out) - mean)
            image = (position >= text_len).astype(jnp.float32)
            d_gamma = (d_logits[:, :text_len] * raw[:, :text_len] * image).sum((1, 2))
            weights = weights.astype(v.dtype)
            d_raw = (d_logits * factor).astype(k.dtype)
            dk = kept[0] + _product("hkq,hqd->hkd", d_raw, q)
            dv = kept[1] + _product("hkq,hqd->hkd", weights, d_out)
            dq = _product("hkq,hkd->hqd", d_raw, k).astype(q.dtype)
            return (dk, dv, kept[2] + d_gamma * head_dim**-0.5), (dq,)

        nothing = (*(jnp.zeros(k.shape, jnp.float32) for _ in "kv"), jnp.zeros(gamma.shape))
        (dk, dv, d_gamma), (dq,) = _over_queries(
            *(add, nothing, size), *(q, high, share, mean, d_out)
        )
        return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_gamma

    return _over_heads(some_heads, group, *saved, d_out)


_attention.defvjp(_forward, _backward)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _factor(
    gamma: Float[Array, " h"], position: Int[Array, " q"], keys: int, text_len: int, head_dim: int
) -> Float[Array, "h q k"]:
    """What a product of q and k is multiplied by: 1 / sqrt(d), and gamma where it belongs."""
    scale = head_dim**-0.5
    image_to_text = (position >= text_len)[:, None] & (jnp.arange(keys) < text_len)
    return jnp.where(image_to_text, gamma[:, None, None] * scale, scale)


def _piece(heads: int, length: int) -> tuple[int, int]:
    """How many heads and how many of their queries are done at once."""
    if heads * length**2 <= MAX_SCORES:
        return heads, length
    scores = max(1, MAX_SCORES // PIECES)
    most = max(1, scores // length**2)
    group = max(n for n in range(1, most + 1) if heads % n == 0)
    return group, max(1, min(length, scores // (group * length)))


def _over_heads(
    call: Callable[..., tuple[jax.Array, ...]], group: int, *arrays: Float[Array, "h ..."]
) -> tuple[Float[Array, "h ..."], ...]:
    """`call` on `group` heads after another."""
    heads = arrays[0].shape[0]
    if group == heads:
        return call(*arrays)
    groups = tuple(x.reshape(-1, group, *x.shape[1:]) for x in arrays)
    out = jax.lax.map(lambda x: call(*x), groups)
    return tuple(x.reshape(heads, *x.shape[2:]) for x in out)


def _over_queries(
    call: Callable[..., tuple[Any, tuple]], kept: Any, size: int, *rows: Float[Array, "h s _"]
) -> tuple[Any, tuple[Float[Array, "h s _"], ...]]:
    """`kept, out = call(kept, positions, *rows)` on about `size` queries after another.

    The last are filled up with zeros, which add nothing to gradients.
    """
    length = rows[0].shape[1]
    pieces = -(-length // size)
    if pieces == 1:
        return call(kept, jnp.arange(length), *rows)
    size = -(-length // pieces)

    def cut(x: Float[Array, "h s w"]) -> Float[Array, "p h q w"]:
        x = jnp.pad(x, ((0, 0), (0, pieces * size - length), (0, 0)))
        return x.reshape(x.shape[0], pieces, size, -1).swapaxes(0, 1)

    positions = jnp.arange(pieces * size).reshape(pieces, size)
    kept, out = jax.lax.scan(
        lambda kept, x: call(kept, *x), kept, (positions, *(cut(x) for x in rows))
    )
    return kept, tuple(
        x.swapaxes(0, 1).reshape(x.shape[1], pieces * size, -1)[:, :length] for x in out
    )


def log_sums(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
) -> LogSums:
    """The sums of `joint_attention`'s softmax, chunk by chunk as well."""
    scale = q.shape[-1] ** -0.5
    text_scale = (gamma.astype(jnp.float32) * scale)[:, None, None, None]
    is_text_key = jnp.arange(k.shape[1]) < text_len

    def sums(q: Float[Array, "b c h d"], position: Int[Array, " c"]) -> Float[Array, "b c h 2"]:
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        image_to_text = (position >= text_len)[:, None] & is_text_key
        logits = logits * jnp.where(image_to_text, text_scale, scale)
        whole, text = (
            jax.nn.logsumexp(logits, axis=-1, where=keys) for keys in (None, is_text_key)
        )
        return jnp.stack([whole, text], axis=-1).swapaxes(1, 2)

    both = over_query_chunks(sums, q, keys=k.shape[1])
    return LogSums(whole=both[..., 0].swapaxes(1, 2), text=both[..., 1].swapaxes(1, 2))


def over_query_chunks(
    attend: Callable[[Float[Array, "b c h d"], Int[Array, " c"]], Float[Array, "b c h k"]],
    q: Float[Array, "b s h d"],
    *,
    keys: int,
) -> Float[Array, "b s h k"]:
    """`attend(queries, their positions)` on all of `q`, at most MAX_SCORES scores at a time."""
    b, s, h, d = q.shape
    chunks = -(-b * h * s * keys // MAX_SCORES)
    if chunks <= 1:
        return attend(q, jnp.arange(s))
    chunks = min(chunks, s)
    size = -(-s // chunks)
    chunks = -(-s // size)
    padded = jnp.pad(q, ((0, 0), (0, chunks * size - s), (0, 0), (0, 0)))
    pieces = padded.reshape(b, chunks, size, h, d).swapaxes(0, 1)
    positions = jnp.arange(chunks * size).reshape(chunks, size)
    out = jax.lax.map(lambda x: jax.checkpoint(attend)(*x), (pieces, positions))
    return out.swapaxes(0, 1).reshape(b, chunks * size, h, -1)[:, :s]
