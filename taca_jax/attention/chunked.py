"""TACA joint attention in plain XLA, a piece of the score matrix at a time: made for the CPU.

It is exact, differentiable in reverse mode, and linear in memory: the backward pass recomputes each
piece's weights from the softmax's maxima and sums, and accumulates the gradients of keys and values
(Dao 2023, arXiv 2307.08691, algorithm 2). Text queries and image queries are done separately, each
with keys that are multiplied by 1 / sqrt(d), and by gamma where it belongs, beforehand: a product
then gives the logits at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from taca_jax.attention.keeping import keepable
from taca_jax.attention.log_sums import LogSums

MAX_SCORES = 2**22
"""Scores held at once, over batch and heads: 16 MiB of float32. Small enough for a CPU's last-level
cache, and below the size from which allocators give memory back to the system at once (a page fault
per 4 KiB costs more than the exponentials); large enough that small models run in one piece."""

FORWARD_PIECES, BACKWARD_PIECES = 2, 6
"""Where there are more than MAX_SCORES, a piece is MAX_SCORES divided by this: as many heads as fit
into it, or a part of one head's queries. The backward pass holds four arrays of that size."""

FORWARD_UNROLL = 2
"""Iterations of the forward pass's loop over heads that are unrolled into one: threads that would
wait for the end of one head's product work on the other's."""

LONG_ROW = 128
"""From this many scores a row on, the backward pass avoids row lengths that a large power of two
divides. One of its products reads down columns, which would then fall into the same few cache sets
and be twice as slow."""


def joint_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
) -> Float[Array, "b s h d"]:
    """As `reference.joint_attention`, computed in float32; differentiable in q, k, v and gamma."""
    return _attention(q, k, v, gamma.astype(jnp.float32), text_len)


class _Saved(NamedTuple):
    """What the backward pass needs. high: each row's largest logit; share: 1 / its sum."""

    q: Float[Array, "b s h d"]
    k: Float[Array, "b s h d"]
    v: Float[Array, "b s h d"]
    out: Float[Array, "b s h d"]
    high: Float[Array, "b s h 1"]
    share: Float[Array, "b s h 1"]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Any, k: Any, v: Any, gamma: Float[Array, " b"], text_len: int) -> jax.Array:
    return _forward(q, k, v, gamma, text_len)[0]


def _forward(
    q: Any, k: Any, v: Any, gamma: Float[Array, " b"], text_len: int
) -> tuple[jax.Array, tuple[_Saved, jax.Array]]:
    piece = _Piece.of(q.shape, FORWARD_PIECES)

    def some_heads(gamma: Any, q: Any, k: Any, v: Any) -> tuple[jax.Array, ...]:
        parts = []
        for queries, factor in _segments(gamma, text_len, q.shape):
            keys = k * factor

            def attend(_: None, q: Any, keys: Any = keys) -> tuple[None, tuple]:
                scores = jnp.einsum("hqd,hkd->hqk", q, keys)
                high = scores.max(-1, keepdims=True)
                weights = jnp.exp(scores - high)
                share = 1 / weights.sum(-1, keepdims=True)
                return None, (jnp.einsum("hqk,hkd->hqd", weights, v) * share, high, share)

            parts.append(_over_queries(attend, None, q[:, queries], most=piece.queries(q))[1])
        return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))

    row = jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)
    found = _over_heads(some_heads, piece, (q, row, row), gamma, q, k, v, unroll=FORWARD_UNROLL)
    out, high, share = keepable(found)
    return out, (_Saved(q, k, v, out, high, share), gamma)


def _backward(
    text_len: int, kept: tuple[_Saved, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, ...]:
    saved, gamma = kept
    piece = _Piece.of(d_out.shape, BACKWARD_PIECES)

    def some_heads(gamma: Any, *arrays: Any) -> tuple[jax.Array, ...]:
        q, k, v, out, high, share, d_out = arrays
        d_out = d_out * share  # once here rather than for every weight
        mean = (out * d_out).sum(-1, keepdims=True)
        dq, dk, dv, d_gamma = [], jnp.zeros_like(k), jnp.zeros_like(v), jnp.zeros_like(gamma)
        for queries, factor in _segments(gamma, text_len, q.shape):
            keys = k * factor

            # Scores are keys x queries here, so that two of the three products of them need no
            # transposition.
            def add(sums: Any, *rows: Any, keys: Any = keys) -> tuple[Any, tuple]:
                q, high, mean, d_out = rows
                high, mean = (x.swapaxes(1, 2) for x in (high, mean))
                scores = jnp.einsum("hkd,hqd->hkq", keys, q)
                weights = jnp.exp(scores - high)
                d_scores = weights * (jnp.einsum("hkd,hqd->hkq", v, d_out) - mean)
                d_keys = sums[0] + jnp.einsum("hkq,hqd->hkd", d_scores, q)
                dv = sums[1] + jnp.einsum("hkq,hqd->hkd", weights, d_out)
                return (d_keys, dv), (jnp.einsum("hkq,hkd->hqd", d_scores, keys),)

            rows = (x[:, queries] for x in (q, high, mean, d_out))
            (d_keys, dv), (part,) = _over_queries(
                add, (jnp.zeros_like(k), dv), *rows, most=piece.queries(q), down_columns=True
            )
            dq.append(part)
            dk += d_keys * factor
            if queries.start == text_len:
                of_text = (d_keys[:, :text_len] * k[:, :text_len]).sum((1, 2))
                d_gamma += of_text * k.shape[-1] ** -0.5
        return jnp.concatenate(dq, axis=1), dk, dv, d_gamma[:, None, None]

    batch, _, heads, _ = d_out.shape
    per_head = jax.ShapeDtypeStruct((batch, 1, heads, 1), jnp.float32)
    results = (saved.q, saved.k, saved.v, per_head)
    dq, dk, dv, d_gamma = _over_heads(some_heads, piece, results, gamma, *saved, d_out)
    return dq, dk, dv, d_gamma.sum((1, 2, 3))


_attention.defvjp(_forward, _backward)


def _segments(
    gamma: Float[Array, " h"], text_len: int, shape: tuple[int, int, int]
) -> list[tuple[slice, float | Float[Array, "h k 1"]]]:
    """The text queries and the image queries, where there are any: their rows, and what keys are
    multiplied by for them (1 / sqrt(d), and gamma where it belongs). shape: `h s d`."""
    _, length, head_dim = shape
    scale = head_dim**-0.5
    image = jnp.where(jnp.arange(length) < text_len, gamma[:, None] * scale, scale)[..., None]
    segments = (slice(0, text_len), scale), (slice(text_len, length), image)
    return [(rows, factor) for rows, factor in segments if rows.stop > rows.start]


class _Piece(NamedTuple):
    """What is computed at once: this many heads of this many samples, and this many scores."""

    samples: int
    heads: int
    scores: int

    def queries(self, q: Float[Array, "h s d"]) -> int:
        """How many queries of each of those heads have that many scores."""
        return max(1, self.scores // (q.shape[0] * q.shape[1]))

    @classmethod
    def of(cls, shape: tuple[int, ...], pieces: int) -> "_Piece":
        """Everything at once if it is MAX_SCORES or less, else pieces of MAX_SCORES / `pieces`.

        shape: of q, `b s h d`.
        """
        batch, length, heads, _ = shape
        if batch * heads * length**2 <= MAX_SCORES:
            return cls(batch, heads, MAX_SCORES)
        scores = max(1, MAX_SCORES // pieces)
        most = max(1, scores // length**2)
        group = max(n for n in range(1, heads + 1) if n <= most and heads % n == 0)
        return cls(1, group, scores)


def _over_heads(
    call: Callable[..., tuple[Float[Array, "h ..."], ...]],
    piece: _Piece,
    results: tuple[Any, ...],
    gamma: Float[Array, " b"],
    *arrays: Float[Array, "b s h _"],
    unroll: int = 1,
) -> tuple[Float[Array, "b ..."], ...]:
    """`call(gamma of each head, *arrays as [heads, s, _] in float32)`, a group of heads at a time.

    results: arrays or structs with the shapes and dtypes of what is returned, heads on axis 2 as in
    `arrays`. The loop cuts each group out and puts its results back, which is faster than to
    transpose everything before and after.
    """
    batch, _, heads, _ = arrays[0].shape
    samples, group, _ = piece

    def run(sample: int | Array, head: int | Array) -> list[Array]:
        def cut(x: Float[Array, "b s h w"]) -> Float[Array, "g s w"]:
            size = (samples, x.shape[1], group, x.shape[3])
            x = jax.lax.dynamic_slice(x, (sample, 0, head, 0), size).astype(jnp.float32)
            return x.swapaxes(1, 2).reshape(-1, *size[1::2])

        own = jnp.repeat(jax.lax.dynamic_slice(gamma, (sample,), (samples,)), group)
        # The barrier keeps XLA from slicing again inside of the loop over scores, which is slow.
        found = call(own, *jax.lax.optimization_barrier([cut(x) for x in arrays]))
        return [
            x.reshape(samples, group, *x.shape[1:]).swapaxes(1, 2).astype(like.dtype)
            for x, like in zip(found, results, strict=True)
        ]

    if (samples, group) == (batch, heads):
        return tuple(run(0, 0))
    groups = heads // group

    def body(n: Array, whole: list[Array]) -> list[Array]:
        sample, head = n // groups, n % groups * group
        parts = run(sample, head)
        return [
            jax.lax.dynamic_update_slice(x, part, (sample, 0, head, 0))
            for x, part in zip(whole, parts, strict=True)
        ]

    empty = [jnp.zeros(x.shape, x.dtype) for x in results]
    return tuple(jax.lax.fori_loop(0, batch * groups, body, empty, unroll=unroll))


def _over_queries(
    call: Callable[..., tuple[Any, tuple]],
    kept: Any,
    *rows: Float[Array, "h q _"],
    most: int,
    down_columns: bool = False,
) -> tuple[Any, tuple[Float[Array, "h q _"], ...]]:
    """`kept, out = call(kept, *rows)` on one piece of the queries after another.

    A piece has at most `most` queries. The last one is padded with zeros, which add nothing to
    gradients. down_columns: whether `call` reads scores down columns (see LONG_ROW).
    """
    length = rows[0].shape[1]
    size = min(length, most)
    size = -(-length // -(-length // size))  # as many pieces, but of equal size
    if down_columns and size >= LONG_ROW:
        size = 8 * (-(-size // 8) | 1)  # an odd number of eights
    pieces = -(-length // size)
    if size == length:
        return call(kept, *rows)

    def cut(x: Float[Array, "h s w"]) -> Float[Array, "p h q w"]:
        x = jnp.pad(x, ((0, 0), (0, pieces * size - length), (0, 0)))
        return x.reshape(x.shape[0], pieces, size, -1).swapaxes(0, 1)

    pieces_of_rows = jax.lax.optimization_barrier(tuple(cut(x) for x in rows))
    kept, out = jax.lax.scan(lambda kept, x: call(kept, *x), kept, pieces_of_rows)
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
    """The sums of `joint_attention`'s softmax, computed in chunks too."""
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


def text_shares(
    q: Float[Array, "b i h d"],
    k: Float[Array, "b t h d"],
    groups: Bool[Array, "b g t"],
    *,
    whole: Float[Array, "b h i"],
    gamma: Float[Array, " b"],
) -> Float[Array, "b g h i"]:
    """The share, 0 to 1, of its attention that each image query pays to groups of text keys.

    q: of image tokens. k: of text tokens. groups: which text tokens belong to each. whole: the
    log-sum-exp of each image query's logits over all keys, from `log_sums`. Computed in float32, in
    chunks.
    """
    scale = (gamma.astype(jnp.float32) * q.shape[-1] ** -0.5)[:, None, None, None]
    members = groups.astype(jnp.float32)

    def shares(q: Float[Array, "b c h d"], position: Int[Array, " c"]) -> Float[Array, "b c h g"]:
        logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        total = jnp.take(whole, position, axis=2, mode="clip")  # the last chunk is padded
        weights = jnp.exp(logits - total[..., None])
        return jnp.einsum("bhqk,bgk->bqhg", weights, members, precision=jax.lax.Precision.HIGHEST)

    return over_query_chunks(shares, q, keys=k.shape[1]).transpose(0, 3, 2, 1)


def over_query_chunks(
    attend: Callable[[Float[Array, "b c h d"], Int[Array, " c"]], Float[Array, "b c h k"]],
    q: Float[Array, "b s h d"],
    *,
    keys: int,
) -> Float[Array, "b s h k"]:
    """`attend(queries, their positions)` on all of `q`, at most MAX_SCORES scores at a time.

    The gradient recomputes each chunk, so that it needs no more memory than the chunks do.
    """
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
