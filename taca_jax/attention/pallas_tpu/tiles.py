"""How the Pallas kernels cut a problem up: columns of heads, blocks of queries, tiles of keys.

Queries, keys and values are read as [b, s, heads * head_dim], as projections write them: to
transpose them to [b, heads, s, head_dim] would take a third of the kernel's time. A *column* is the
128 lanes, or more, that one head fills or that several small heads fill together.

Scores are held transposed, keys x queries, with keys on sublanes and queries on lanes. Sums over
keys then run along sublanes, and what belongs to a query (its maximum, its sum, its gamma) is a row
of lanes. Tiles of keys are a static list: which of them hold text is known when the kernel is
built, and a tile of image keys never sees gamma.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from taca_jax.attention.pallas_tpu.target import kernel_vmem
from taca_jax.parallel.chips import Chip

LANES, SUBLANES = 128, 8
KEY_ALIGNMENT = 16
"""Rows of one register of bfloat16. Tiles of keys begin at multiples of it."""

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""The logit of padding: next to any real key's, its exponential is 0."""

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
"""Which axes a product contracts, as BLAS names them: T is a transposed operand, N is not."""


@dataclass(frozen=True)
class Blocks:
    """Sizes that decide about speed and memory, not about results.

    queries: of a block, a multiple of 128. keys: of a tile, a multiple of 16. per_step: blocks of
    queries in a grid step, unrolled, so that a step's overhead is paid once and each block's last
    tiles overlap with the next one's first. prefetch: tiles whose scores are computed ahead of
    their use. unroll: tiles of a block that are unrolled; where there are more, a loop takes that
    many at a time. transposed: whether the backward kernel accumulates the gradients of keys and
    values as [head_dim, keys], which fills a wide matrix unit; the forward kernel ignores it.
    key_buffers: copies of a head's keys and values in VMEM; with 2, the next head's arrive while
    this one's are in use, and 1 is for where there is no room for that.

    Raises ValueError for sizes that no kernel can have.
    """

    queries: int
    keys: int
    per_step: int = 1
    prefetch: int = 1
    unroll: int = 24
    transposed: bool = False
    key_buffers: int = 2

    def __post_init__(self):
        for name, size, multiple in (
            ("queries", self.queries, LANES),
            ("keys", self.keys, KEY_ALIGNMENT),
            ("per_step", self.per_step, 1),
            ("prefetch", self.prefetch, 1),
            ("unroll", self.unroll, 1),
            ("key_buffers", self.key_buffers, 1),
        ):
            if size < 1 or size % multiple:
                raise ValueError(f"blocks.{name} is {size}; it must be a multiple of {multiple}")


@dataclass(frozen=True)
class Tile:
    """Keys start..stop - 1 of the sequence. `stop` may lie beyond its end."""

    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def window(self, offset: int | Array) -> Any:
        """Where the tile lies in an array of keys, `offset` rows further on."""
        if isinstance(offset, int):
            return slice(self.start + offset, self.stop + offset)
        return pl.ds(pl.multiple_of(self.start + offset, KEY_ALIGNMENT), self.rows)


@dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for. Gamma is not part of it: that is data.

    dtype: of queries, keys, values and the output. group: heads that share one column of lanes.
    chip: None where it is not known.
    """

    queries: int
    keys: int
    text_len: int
    head_dim: int
    group: int
    dtype: np.dtype
    chip: Chip | None
    blocks: Blocks

    @property
    def vmem(self) -> int:
        """Bytes of VMEM that the kernel may take."""
        return kernel_vmem(self.chip)

    @property
    def column(self) -> int:
        """Lanes of a column."""
        return self.group * self.head_dim

    def head_rows(self, head: int) -> slice:
        """Where a head lies in a transposed column."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    @property
    def padded_keys(self) -> int:
        """The number of keys that the kernel reads; those from `keys` on may be anything."""
        return round_up(self.keys, KEY_ALIGNMENT)

    @property
    def query_block(self) -> int:
        return min(self.blocks.queries, round_up(self.queries, LANES))

    @property
    def step_blocks(self) -> list[slice]:
        """Where each block of a grid step lies in it.

        There are at most `per_step`, and a number that divides all blocks: no step does too much.
        """
        size = self.query_block
        blocks = -(-self.queries // size)
        count = max(n for n in range(1, self.blocks.per_step + 1) if blocks % n == 0)
        return [slice(n * size, (n + 1) * size) for n in range(count)]

    @property
    def step_queries(self) -> int:
        return self.step_blocks[-1].stop

    @property
    def steps(self) -> int:
        return -(-self.queries // self.step_queries)

    @property
    def ragged_queries(self) -> bool:
        """Whether the last step reaches beyond the last query."""
        return self.queries % self.step_queries != 0

    @property
    def scale(self) -> float:
        """What a product of q and k is multiplied by to be a logit in base 2."""
        return LOG2_E / math.sqrt(self.head_dim)

    def cost(self, batch: int, columns: int, products: int, *arrays: Any) -> pl.CostEstimate:
        """What a kernel takes that computes so many products for each query and key, between these
        arrays in main memory; for the compiler's schedule, and for plans.

        FLOPs are the matrix unit's, which fills heads up to a whole column of lanes.
        """
        pairs = batch * columns * self.group * self.queries * self.keys
        return pl.CostEstimate(
            flops=2 * products * pairs * round_up(self.column, LANES),
            transcendentals=pairs,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        )

    def schedule(self) -> tuple[list[Tile], list[Tile], int, list[Tile]]:
        """All tiles in order: some that are unrolled; some to repeat, and how often; and the rest.

        Tiles that are repeated hold image keys alone, none beyond the end.
        """
        size, end = self.blocks.keys, self.padded_keys
        tiles = [Tile(start, min(start + size, end)) for start in range(0, end, size)]
        if len(tiles) <= self.blocks.unroll:
            return tiles, [], 0, []
        lead = max(1, -(-self.text_len // size))
        whole = self.keys // size - lead
        times = max(0, whole) // self.blocks.unroll
        repeated = tiles[lead : lead + self.blocks.unroll]
        return tiles[:lead], repeated, times, tiles[lead + times * self.blocks.unroll :]


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def heads_per_column(heads: int, head_dim: int) -> int | None:
    """How many heads fill a column of lanes; None where they cannot, evenly."""
    if head_dim % LANES == 0:
        return 1
    group = LANES // head_dim
    return group if LANES % head_dim == 0 and heads % group == 0 else None


def dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    """A product accumulated in float32; of float32 operands, at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def query_positions(problem: Problem, first: int | Array) -> Int[Array, "1 q"]:
    """The number of each query of the block that begins at query `first`, along lanes."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (1, problem.query_block), 1)


def row_numbers(tile: Tile) -> Int[Array, "k 1"]:
    """The position of each key of a tile, along sublanes."""
    return tile.start + jax.lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0)


def only_head(x: Float[Array, "r w"], problem: Problem, head: int) -> Float[Array, "r w"]:
    """`x` with zeros in the other heads' lanes, so that contracting the column is that head's.

    The matrix unit is no faster for fewer lanes, and moving lanes takes time.
    """
    if problem.group == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, problem.column), 1)
    return jnp.where(lane // problem.head_dim == head, x, jnp.zeros_like(x))


def existing_rows(x: Float[Array, "r w"], start: int | Array, stop: int) -> Float[Array, "r w"]:
    """`x`, which begins at row `start` of an array, with zeros from the array's row `stop` on.

    What lies beyond an array's end may be anything, NaN too.
    """
    row = start + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where(row < stop, x, jnp.zeros_like(x))


def on_text(problem: Problem, tile: Tile, text: Any, other: Any) -> Any:
    """`text` for a tile's text keys, `other` for its image keys.

    Each is a number, or a row with a value per query. Only for a tile that holds both kinds of keys
    the result is larger.
    """
    if tile.start >= problem.text_len:
        return other
    if tile.stop <= problem.text_len:
        return text
    return jnp.where(row_numbers(tile) < problem.text_len, text, other)


def run_schedule(
    problem: Problem,
    prepare: Callable[[Tile, int, int | Array], Any],
    add: Callable[[Tile, int, int | Array, Any], None],
    carry: Callable[[Any | None], Any] = lambda _: None,
) -> None:
    """`add(tile, head, offset, prepare(tile, head, offset))` for every tile and head.

    The next tiles are prepared before this one is added, so that the matrix unit works on those
    while the vector unit works on this. In a loop, `offset` is how many rows further on a tile lies
    than it says. What `add` keeps outside of references has to be carried through the loop:
    `carry(None)` returns it, `carry(value)` sets it.
    """

    def run(tiles: list[Tile], offset: int | Array) -> None:
        steps = [(tile, head, offset) for tile in tiles for head in range(problem.group)]
        ahead = [prepare(*step) for step in steps[: problem.blocks.prefetch]]
        for n, step in enumerate(steps):
            if n + problem.blocks.prefetch < len(steps):
                ahead.append(prepare(*steps[n + problem.blocks.prefetch]))
            add(*step, ahead[n])

    before, repeated, times, after = problem.schedule()
    run(before, 0)
    if times:
        stride = repeated[-1].stop - repeated[0].start

        def body(i: Array, kept: Any) -> Any:
            carry(kept)
            run(repeated, i * stride)
            return carry(None)

        carry(jax.lax.fori_loop(0, times, body, carry(None)))
    run(after, 0)
