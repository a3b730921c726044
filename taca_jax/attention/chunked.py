"""TACA joint attention in plain XLA, over chunks of queries: the CPU's implementation.

Exact (gamma multiplies the float32 logits), differentiable, and never larger in memory than
MAX_SCORES scores: the backward pass recomputes each chunk instead of keeping its weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from taca_jax.attention.log_sums import LogSums

MAX_SCORES = 2**22
"""Scores held at once, over batch and heads: 16 MiB of float32. Small enough to stay in a CPU's
last cache and under what allocators return to the system at once (a page fault per 4 KiB costs
more than the exponentials); large enough that small models run in one piece."""


def joint_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
) -> Float[Array, "b s h d"]:
    """As `reference.joint_attention`: any sizes, gamma per sample, float32 softmax."""
    scale = q.shape[-1] ** -0.5
    # Heads outermost: batched matrix products over [s, d] slabs are what XLA's CPU backend is
    # fast at; the same einsum over b s h d is several times slower there.
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    is_text_key = jnp.arange(k.shape[2]) < text_len
    text_scale = (gamma.astype(jnp.float32) * scale)[:, None, None, None]

    def attend(q: Float[Array, "b c h d"], position: Int[Array, " c"]) -> Float[Array, "b c h d"]:
        logits = jnp.einsum("bqhd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
        image_to_text = (position >= text_len)[:, None] & is_text_key
        logits = logits * jnp.where(image_to_text, text_scale, scale)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum(
            "bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (out / total).transpose(0, 2, 1, 3).astype(q.dtype)

    return over_query_chunks(attend, q, keys=k.shape[2])


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
