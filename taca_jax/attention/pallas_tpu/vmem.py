"""How much VMEM each kernel needs, and blocks that are small enough for what there is.

A kernel's blocks of queries are double-buffered: while one is worked on, the next one arrives and
the one before leaves. Keys and values of a head, and in the backward pass their gradients, are
there whole, `Blocks.key_buffers` times. The rest is the kernel's own arrays, and registers that the
compiler spills. How many it will spill cannot be known here, but there is a bound.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from taca_jax.attention.pallas_tpu.target import device_kind
from taca_jax.attention.pallas_tpu.tiles import LANES, SUBLANES, Problem, round_up

Direction = Literal["forward", "backward"]

FLOAT32_BYTES = 4
MIB = 2**20

QUERY_BUFFERS = 2

QUERY_ARRAYS: dict[Direction, int] = {"forward": 2, "backward": 4}
"""Arrays of the size of the queries: q and the output; backward, their gradients as well."""

KEY_ARRAYS: dict[Direction, int] = {"forward": 2, "backward": 4}
"""Arrays of the size of the keys: keys and values; backward, their gradients as well."""

ROW_ARRAYS = 3
"""Arrays with one float32 per query and head, at most: the softmax's three sums; backward, two of
them and gamma's gradient."""

SPILLED_TILES = 10
SPILL_LITTLE = ("v5e", "v5p", "v6e")
SPILLED_PER_TILE = 0.25
SPILLED_PER_FLOAT32_TILE = 1.0
"""Bounds on what the compiler spills, in tiles of scores: SPILLED_TILES in bfloat16 on chips that
spill little. On others (v4) each tile of a block that is unrolled adds to that. In float32 those of
all blocks of a step do, on any chip, and all of it counts `prefetch` times. These bounds were found
by compiling at many lengths."""

LEAST_UNROLL = 4


class NoRoomError(ValueError):
    """No blocks of a kernel fit into VMEM. lack: which numbers do not fit, without what to do."""

    def __init__(self, lack: str):
        super().__init__(f"{lack}; take implementation='auto' or 'chunked'")
        self.lack = lack


def fitted(problem: Problem, direction: Direction, *, may_shrink: bool) -> Problem:
    """`problem`, with smaller blocks where its own do not fit and `may_shrink` allows it.

    Raises NoRoomError where no blocks fit.
    """
    candidates = list(smaller(problem, direction)) if may_shrink else [problem]
    for candidate in candidates:
        if needed_vmem(candidate, direction) <= problem.vmem:
            return candidate
    least = needed_vmem(candidates[-1], direction) / MIB
    raise NoRoomError(
        f"attention over {problem.keys} keys of head size {problem.head_dim} in {problem.dtype} "
        f"needs {least:.1f} MiB of VMEM in its {direction} pass, and a kernel may take "
        f"{problem.vmem / MIB:.1f} MiB on {device_kind()}"
    )


def smaller(problem: Problem, direction: Direction) -> Iterator[Problem]:
    """`problem`, then with blocks that need less and less VMEM, and cost more and more speed."""
    yield problem
    queries = range(problem.blocks.queries - LANES, 0, -LANES)
    changes = ({"key_buffers": 1}, {"per_step": 1}, {"unroll": LEAST_UNROLL})
    for change in (*changes, *({"queries": n} for n in queries)):
        candidate = replace(problem, blocks=replace(problem.blocks, **change))
        if needed_vmem(candidate, direction) < needed_vmem(problem, direction):
            problem = candidate
            yield problem


def needed_vmem(problem: Problem, direction: Direction) -> int:
    """Bytes of VMEM that a kernel takes at the most."""
    lanes = round_up(problem.column, LANES)
    rows = problem.step_queries
    itemsize = problem.dtype.itemsize
    queries = QUERY_ARRAYS[direction] * rows * lanes * itemsize
    per_row = ROW_ARRAYS * problem.group * rows * FLOAT32_BYTES
    keys = KEY_ARRAYS[direction] * problem.padded_keys * lanes * itemsize
    accumulators = round_up(problem.column, SUBLANES) * rows * FLOAT32_BYTES
    if direction == "backward":
        accumulators += 2 * round_up(problem.padded_keys, LANES) * lanes * FLOAT32_BYTES
    tile = max(problem.blocks.keys, problem.column) * problem.query_block * FLOAT32_BYTES
    return (
        QUERY_BUFFERS * (queries + per_row)
        + problem.blocks.key_buffers * keys
        + accumulators
        + math.ceil(_spilled_tiles(problem) * tile)
    )


def _spilled_tiles(problem: Problem) -> float:
    before, repeated, _, after = problem.schedule()
    unrolled = problem.group * len([*before, *repeated, *after])
    if problem.dtype.itemsize == FLOAT32_BYTES:
        unrolled *= len(problem.step_blocks)
        return problem.blocks.prefetch * (SPILLED_TILES + SPILLED_PER_FLOAT32_TILE * unrolled)
    if problem.chip is not None and problem.chip.name in SPILL_LITTLE:
        return SPILLED_TILES
    return SPILLED_TILES + SPILLED_PER_TILE * unrolled
