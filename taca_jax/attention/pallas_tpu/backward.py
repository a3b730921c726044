"""TACA joint attention on TPU, backward: all gradients from one pass over the scores.

A grid step takes some blocks of queries against all keys of their head, as the forward kernel does,
and recomputes each tile's weights from the forward kernel's sums. Gradients of keys and values are
accumulated in VMEM, in float32, over the blocks of queries. That takes five products a tile (Dao
2023, arXiv 2307.08691, algorithm 2). Gamma multiplies scores of image queries and text keys on the
way in, and their gradients on the way out.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from taca_jax.attention.pallas_tpu.tiles import (
    LANES,
    MASKED,
    NN,
    NT,
    TN,
    Problem,
    Tile,
    dot,
    existing_rows,
    on_text,
    only_head,
    query_positions,
    round_up,
    row_numbers,
    run_schedule,
)

PRODUCTS = 5
"""Of each query and key: the score again, and the gradients of weight, value, query and key."""


def backward(
    q: Float[Array, "b q c"],
    k: Float[Array, "b k c"],
    v: Float[Array, "b k c"],
    gamma: Float[Array, " b"],
    first_query: Int[Array, " 1"],
    out: Float[Array, "b q c"],
    high: Float[Array, "b h 1 q"],
    log_total: Float[Array, "b h 1 q"],
    d_out: Float[Array, "b q c"],
    *,
    problem: Problem,
    wants_gamma: bool,
    interpret: bool,
) -> list[jax.Array]:
    """[dq, dk, dv] in the inputs' dtypes and, with `wants_gamma`, gamma's gradient per query.

    out, high, log_total: what `forward` returned. Gamma's gradient is float32 `[b, h, 1, q]`: its
    sum over heads and queries is the gradient of the sample's gamma.
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
    outputs = 4 if wants_gamma else 3
    summed = (
        (problem.column, round_up(problem.padded_keys, LANES))
        if problem.blocks.transposed
        else (problem.padded_keys, problem.column)
    )
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, high)][:outputs]
    return pl.pallas_call(
        partial(_kernel, problem=problem, wants_gamma=wants_gamma),
        grid=(batch, columns, problem.steps),
        in_specs=[
            *(smem, smem),
            *(query_spec, key_spec, key_spec, query_spec, query_spec, sums_spec, sums_spec),
        ],
        out_specs=[query_spec, key_spec, key_spec, sums_spec][:outputs],
        out_shape=results,
        scratch_shapes=[
            pltpu.VMEM((problem.column, rows), jnp.float32),
            pltpu.VMEM(summed, jnp.float32),
            pltpu.VMEM(summed, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=problem.vmem,
        ),
        cost_estimate=problem.cost(batch, columns, PRODUCTS, q, k, v, out, d_out, *results),
        name="taca_attention_backward",
        interpret=interpret,
    )(first_query, gamma, q, k, v, out, d_out, high, log_total)


def _kernel(
    first_query_ref: Any,
    gamma_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    d_out_ref: Any,
    high_ref: Any,
    log_total_ref: Any,
    *refs: Any,
    problem: Problem,
    wants_gamma: bool,
) -> None:
    *results, dq_sum, dk_sum, dv_sum = refs
    dq_ref, dk_ref, dv_ref = results[:3]
    step = pl.program_id(2)
    heads = range(problem.group)
    softmax_scale = 1 / math.sqrt(problem.head_dim)

    @pl.when(step == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def add_block(block: slice) -> None:
        first = step * problem.step_queries + block.start
        position = query_positions(problem, first)
        q, out, d_out = (ref[0, block] for ref in (q_ref, out_ref, d_out_ref))
        high = [high_ref[0, head, :, block] for head in heads]
        log_total = [log_total_ref[0, head, :, block] for head in heads]
        if problem.ragged_queries:
            q, out, d_out = (existing_rows(x, first, problem.queries) for x in (q, out, d_out))
            exists = position < problem.queries
            high, log_total = ([jnp.where(exists, x, 0) for x in row] for row in (high, log_total))
        queries = [only_head(q, problem, head) for head in heads]
        d_outs = [only_head(d_out, problem, head) for head in heads]
        transposed = (q.T, d_out.T) if problem.blocks.transposed else None
        products = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).T
        delta = [products[problem.head_rows(head)].sum(0, keepdims=True) for head in heads]

        is_image = first_query_ref[0] + position >= problem.text_len
        gamma_row = jnp.where(is_image, gamma_ref[pl.program_id(0)], 1.0)
        dq_sum[:, block] = jnp.zeros_like(dq_sum[:, block])
        d_gamma = [jnp.zeros_like(gamma_row) for _ in heads]

        def tile_of(ref: Any, tile: Tile, offset: int | Array) -> Float[Array, "k w"]:
            x = ref[0, tile.window(offset), :]
            return existing_rows(x, tile.start, problem.keys) if tile.stop > problem.keys else x

        def prepare(tile: Tile, head: int, offset: int | Array) -> tuple[jax.Array, jax.Array]:
            """Products of q and k, and the weights' gradients: all that needs no exponential."""
            k, v = tile_of(k_ref, tile, offset), tile_of(v_ref, tile, offset)
            return dot(k, queries[head], NT), dot(v, d_outs[head], NT)

        def add(
            tile: Tile, head: int, offset: int | Array, prepared: tuple[jax.Array, jax.Array]
        ) -> None:
            raw, d_weights = prepared
            s = raw * on_text(problem, tile, gamma_row * problem.scale, problem.scale)
            if tile.stop > problem.keys:
                s = jnp.where(row_numbers(tile) < problem.keys, s, MASKED)
            weights = jnp.exp2((s - high[head]) - log_total[head])
            d_scores = weights * (d_weights - delta[head])
            if tile.start < problem.text_len:
                if wants_gamma:
                    of_text = d_scores * raw * on_text(problem, tile, 1.0, 0.0)
                    d_gamma[head] += of_text.sum(0, keepdims=True)
                d_scores = d_scores * on_text(problem, tile, gamma_row, 1.0)
            weights, d_scores = weights.astype(v_ref.dtype), d_scores.astype(k_ref.dtype)
            window, rows = tile.window(offset), problem.head_rows(head)
            if transposed is not None:
                q_columns, d_out_columns = (x[rows] for x in transposed)
                dv_sum[rows, window] += dot(d_out_columns, weights, NT)
                dk_sum[rows, window] += dot(q_columns, d_scores, NT)
            else:
                dv_sum[window] += dot(weights, d_outs[head], NN)
                dk_sum[window] += dot(d_scores, queries[head], NN)
            k = tile_of(k_ref, tile, offset)
            if problem.group == 1:
                dq_sum[rows, block] += dot(k, d_scores, TN)
            else:
                dq_sum[rows, block] += dot(k.T[rows], d_scores, NN)

        run_schedule(problem, prepare, add)

        dq_ref[0, block] = (dq_sum[:, block] * softmax_scale).T.astype(dq_ref.dtype)
        if wants_gamma:
            for head in heads:
                results[3][0, head, :, block] = jnp.where(
                    is_image, d_gamma[head] * softmax_scale, 0
                )

    for block in problem.step_blocks:
        add_block(block)

    @pl.when(step == problem.steps - 1)
    def _() -> None:
        for ref, total, scale in ((dk_ref, dk_sum, softmax_scale), (dv_ref, dv_sum, 1.0)):
            x = total[...] * scale
            if problem.blocks.transposed:
                x = x.T[: problem.padded_keys]
            ref[0] = x.astype(ref.dtype)
