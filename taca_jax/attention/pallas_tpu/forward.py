"""TACA joint attention on TPU, forward.

A grid step takes some blocks of queries, one after the other, against all keys of their head, tile
by tile; the keys stay in VMEM. Gamma is data in SMEM, so that one compiled kernel serves every
schedule. It is part of the factor log2(e) / sqrt(d) that scores are multiplied by anyway, on tiles
of text keys only.

Exponentials are taken relative to the maximum over the first tile alone, so that nothing has to be
rescaled later. Where that overflows (in base 2, a later logit lies 100 or more above all of the
first tile's), the grid step is repeated with the online softmax (Milakov and Gimelshein 2018,
arXiv 1805.02867). So any finite logits give the right result, and usual ones cost nothing more.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from taca_jax.attention.pallas_tpu.tiles import (
    MASKED,
    NN,
    NT,
    SUBLANES,
    TN,
    Problem,
    Tile,
    dot,
    existing_rows,
    on_text,
    only_head,
    query_positions,
    row_numbers,
    run_schedule,
)

Sums = Literal["none", "all", "all and text"]
_OUTPUTS: dict[Sums, int] = {"none": 1, "all": 3, "all and text": 4}

PRODUCTS = 2
"""Of each query and key: the score, and the weight times the value."""

OVERFLOW = 2.0**100
"""A denominator above this may stand beside a numerator that has overflowed, since float32 ends at
2^128; values up to 2^27 times larger than the denominator's terms are safe below it."""


def forward(
    q: Float[Array, "b q c"],
    k: Float[Array, "b k c"],
    v: Float[Array, "b k c"],
    gamma: Float[Array, " b"],
    first_query: Int[Array, " 1"],
    *,
    problem: Problem,
    sums: Sums,
    interpret: bool,
) -> list[jax.Array]:
    """[output] in q's dtype and, as `sums` asks, what the softmax summed, `[b, h, 1, q]` each.

    c is heads x head_dim. first_query: the position of the first query in the joint sequence. The
    sums are float32 and in base 2, gamma included: `high`, which exponents are relative to; the log
    of the sum over all keys, relative to `high`; and that over the text keys. They are not added up
    because next to a `high` of thousands the logs would lose their digits.
    """
    batch, _, width = q.shape
    columns = width // problem.column
    rows = problem.step_queries
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    query_spec = pl.BlockSpec((1, rows, problem.column), lambda b, c, i: (b, i, c))
    key_spec = pl.BlockSpec(
        (1, problem.padded_keys, problem.column),
        lambda b, c, i: (b, 0, c),
        pipeline_mode=pl.Buffered(problem.blocks.key_buffers),
    )
    sums_spec = pl.BlockSpec((1, problem.group, 1, rows), lambda b, c, i: (b, c, 0, i))
    shape = (batch, columns * problem.group, 1, problem.queries)
    outputs = _OUTPUTS[sums]
    results = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        *[jax.ShapeDtypeStruct(shape, jnp.float32)] * (outputs - 1),
    ]
    return pl.pallas_call(
        partial(_kernel, problem=problem),
        grid=(batch, columns, problem.steps),
        in_specs=[smem, smem, query_spec, key_spec, key_spec],
        out_specs=[query_spec, *[sums_spec] * (outputs - 1)],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM((problem.column, rows), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=problem.vmem,
        ),
        cost_estimate=problem.cost(batch, columns, PRODUCTS, q, k, v, *results),
        name="taca_attention_forward",
        interpret=interpret,
    )(first_query, gamma, q, k, v)


@dataclass(frozen=True)
class _Block:
    """A block of queries.

    rows: where it lies in the grid step. queries: for each head of the column, with zeros in the
    other heads' lanes. text_row: what each query's products with text keys are multiplied by.
    accumulator: its part of the array in which weights times values are summed, `[column, q]`.
    """

    rows: slice
    queries: list[Float[Array, "q w"]]
    text_row: Float[Array, "1 q"]
    accumulator: Any


@dataclass
class _Softmax:
    """One head's softmax while tiles are added to it: float32, a value per query.

    high: what exponents are relative to. total: the sum of exponentials, in SUBLANES partial sums
    that are added at the end. text: the same for text keys alone.
    """

    high: Float[Array, "1 q"]
    total: Float[Array, "p q"]
    text: Float[Array, "p q"]


def _kernel(
    first_query_ref: Any,
    gamma_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    problem: Problem,
) -> None:
    out_ref, *sums_refs, accumulator = refs
    gamma = gamma_ref[pl.program_id(0)]

    def block_of(rows: slice) -> _Block:
        first = pl.program_id(2) * problem.step_queries + rows.start
        q = q_ref[0, rows]
        if problem.ragged_queries:
            q = existing_rows(q, first, problem.queries)
        is_image = first_query_ref[0] + query_positions(problem, first) >= problem.text_len
        return _Block(
            rows=rows,
            queries=[only_head(q, problem, head) for head in range(problem.group)],
            text_row=jnp.where(is_image, gamma * problem.scale, problem.scale),
            accumulator=accumulator.at[:, rows],
        )

    def finish(block: _Block, softmaxes: list[_Softmax]) -> None:
        """Divides by the sums, transposes queries back to rows, and writes the block."""
        parts = []
        for head, softmax in enumerate(softmaxes):
            total = softmax.total.sum(0, keepdims=True)
            parts.append(block.accumulator[problem.head_rows(head)] * (1 / total))
            text = softmax.text.sum(0, keepdims=True)
            sums = (softmax.high, jnp.log2(total), jnp.log2(text))
            for ref, value in zip(sums_refs, sums, strict=False):
                ref[0, head, :, block.rows] = value
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        out_ref[0, block.rows] = out.T.astype(out_ref.dtype)

    blocks = [block_of(rows) for rows in problem.step_blocks]
    totals = []
    for block in blocks:
        softmaxes = _from_first_tile(block, k_ref, v_ref, problem)
        finish(block, softmaxes)
        totals += [softmax.total for softmax in softmaxes]

    @pl.when(jnp.max(jnp.concatenate(totals)) > OVERFLOW)
    def _() -> None:
        for block in blocks:
            finish(
                block,
                [_online(block, head, k_ref, v_ref, problem) for head in range(problem.group)],
            )


def _from_first_tile(block: _Block, k_ref: Any, v_ref: Any, problem: Problem) -> list[_Softmax]:
    """Accumulates exp2(score - the first tile's maximum) times values; returns each head's sums."""
    softmaxes: list[_Softmax] = []

    def scores(tile: Tile, head: int, offset: int | Array) -> Float[Array, "k q"]:
        s = dot(k_ref[0, tile.window(offset), :], block.queries[head], NT)
        s = s * on_text(problem, tile, block.text_row, problem.scale)
        if tile.stop > problem.keys:
            s = jnp.where(row_numbers(tile) < problem.keys, s, MASKED)
        return s

    def add(tile: Tile, head: int, offset: int | Array, s: Float[Array, "k q"]) -> None:
        first = head == len(softmaxes)
        high = s.max(0, keepdims=True) if first else softmaxes[head].high
        p = jnp.exp2(s - high)
        v = v_ref[0, tile.window(offset), :]
        if tile.stop > problem.keys:
            v = existing_rows(v, tile.start, problem.keys)
        rows = problem.head_rows(head)
        if problem.group == 1:
            out = dot(v, p.astype(v.dtype), TN)
        else:
            out = dot(v.T[rows], p.astype(v.dtype), NN)
        if first:
            block.accumulator[rows] = out
            nothing = jnp.zeros((SUBLANES, p.shape[1]), jnp.float32)
            softmaxes.append(_Softmax(high, nothing, nothing))
        else:
            block.accumulator[rows] += out
        softmax = softmaxes[head]
        if tile.start < problem.text_len <= tile.stop:  # the last tile with text
            of_text = p
            if problem.text_len < tile.stop:
                of_text = jnp.where(row_numbers(tile) < problem.text_len, p, 0)
            softmax.text = softmax.total + _partial_sums(of_text)
        softmax.total += _partial_sums(p)

    def carry(totals: list[Array] | None) -> list[Array]:
        for softmax, total in zip(softmaxes, totals or [], strict=False):
            softmax.total = total
        return [softmax.total for softmax in softmaxes]

    run_schedule(problem, scores, add, carry)
    return softmaxes


def _online(block: _Block, head: int, k_ref: Any, v_ref: Any, problem: Problem) -> _Softmax:
    """As `_from_first_tile`, for one head and relative to a running maximum: slower, never inf."""
    size = min(problem.blocks.keys, problem.padded_keys)
    rows = problem.head_rows(head)
    query, text_row, accumulator = block.queries[head], block.text_row, block.accumulator
    accumulator[rows] = jnp.zeros_like(accumulator[rows])

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        high, total, text = carry
        # The last tile is moved back so that it fits; its rows that were there before are masked.
        start = jnp.minimum(i * size, problem.padded_keys - size)
        window = pl.ds(pl.multiple_of(start, SUBLANES), size)
        row = start + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        is_text = row < problem.text_len
        s = dot(k_ref[0, window, :], query, NT) * jnp.where(is_text, text_row, problem.scale)
        s = jnp.where((row >= i * size) & (row < problem.keys), s, MASKED)
        higher = jnp.maximum(high, s.max(0, keepdims=True))
        shrink = jnp.exp2(high - higher)
        p = jnp.exp2(s - higher)
        v = existing_rows(v_ref[0, window, :], start, problem.keys)
        out = dot(v.T[rows], p.astype(v.dtype), NN)
        accumulator[rows] = accumulator[rows] * shrink + out
        total = total * shrink + p.sum(0, keepdims=True)
        text = text * shrink + jnp.where(is_text, p, 0).sum(0, keepdims=True)
        return higher, total, text

    nothing = jnp.zeros_like(text_row)
    start = (jnp.full_like(text_row, MASKED), nothing, nothing)
    return _Softmax(*jax.lax.fori_loop(0, -(-problem.padded_keys // size), body, start))


def _partial_sums(p: Float[Array, "k q"]) -> Float[Array, "8 q"]:
    """Sums of whole registers; the SUBLANES rows that remain are added up at the block's end."""
    return p.reshape(-1, SUBLANES, p.shape[1]).sum(0)
