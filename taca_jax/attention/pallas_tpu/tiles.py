"""How the Pallas kernels cut a problem up: columns of heads, blocks of queries, tiles of keys.

Queries, keys and values are read as [b, s, heads * head_dim], as projections leave them; turning
them to [b, heads, s, head_dim] would cost a third of the kernel.

Scores are held transposed, keys on sublanes and queries on lanes: sums over keys run along
sublanes, and what belongs to a query (its maximum, its denominator, its share of gamma) is a row.
Tiles of keys are a static list: which of them hold text is known when the kernel is built, and a
tile of image keys never sees gamma.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

LANES, SUBLANES = 128, 8
KEY_ALIGNMENT = 16
"""Rows of one register of bfloat16: tiles of keys begin at multiples of it."""

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""The logit of a key that is not there: beside any other, its exponential is 0."""

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
"""Which axes a product contracts, in the names of BLAS: T is a transposed operand."""


@dataclass(frozen=True)
class Blocks:
    """Sizes that decide speed and nothing else.

    queries: of a block, a multiple of 128. keys: of a tile, a multiple of 16. per_step: blocks of
    queries in a grid step, one after the other in straight code, so that a step's bookkeeping is
    paid once and each block's last tiles overlap with the next one's first. prefetch: tiles whose
    scores are computed ahead of their use. unroll: tiles of straight code a block; with more, it
    loops over that many at a time. transposed: whether the backward pass accumulates the gradients
    of keys and values as [head_dim, keys], which fills a wide matrix unit; the forward pass ignores
    it.

    Raises ValueError for sizes that no kernel can have.
    """

    queries: int
    keys: int
    per_step: int = 1
    prefetch: int = 1
    unroll: int = 24
    transposed: bool = False

    def __post_init__(self):
        for name, size, multiple in (
            ("queries", self.queries, LANES),
            ("keys", self.keys, KEY_ALIGNMENT),
            ("per_step", self.per_step, 1),
            ("prefetch", self.prefetch, 1),
            ("unroll", self.unroll, 1),
        ):
            if size < 1 or size % multiple:
                raise ValueError(f"blocks.{name} is {size}; it must be a multiple of {multiple}")


@dataclass(frozen=True)
class Tile:
    """Keys start..stop - 1 of the sequence; `stop` may lie beyond its end."""

    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def window(self, offset: int | Array) -> Any:
        """The tile's rows of a reference, `offset` rows further on."""
        if isinstance(offset, int):
            return slice(self.start + offset, self.stop + offset)
        return pl.ds(pl.multiple_of(self.start + offset, KEY_ALIGNMENT), self.rows)


@dataclass(frozen=True)
class Problem:
    """The static shape of one call: all that a kernel is specialised to. Gamma is not: it is data.

    group: heads that share one column of lanes. vmem_limit: bytes that a kernel may use.
    """

    queries: int
    keys: int
    text_len: int
    head_dim: int
    group: int
    blocks: Blocks
    vmem_limit: int

    @property
    def column(self) -> int:
        """Lanes of a block."""
        return self.group * self.head_dim

    def head_rows(self, head: int) -> slice:
        """A head's rows of a transposed column."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    @property
    def padded_keys(self) -> int:
        """Rows of a block of keys; those from `keys` on hold nothing."""
        return round_up(self.keys, KEY_ALIGNMENT)

    def key_bytes(self, itemsize: int) -> int:
        """Of a head column's keys, which stay in VMEM: as many again for its values."""
        return self.padded_keys * round_up(self.column, LANES) * itemsize

    @property
    def query_block(self) -> int:
        return min(self.blocks.queries, round_up(self.queries, LANES))

    @property
    def step_blocks(self) -> list[slice]:
        """The rows of each block of a grid step: as many as leave no step with a block too many."""
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
        """From a product of q and k to a logit in base 2."""
        return LOG2_E / math.sqrt(self.head_dim)

    def schedule(self) -> tuple[list[Tile], list[Tile], int, list[Tile]]:
        """All tiles in order: straight code, then a list to repeat so many times, then the rest.

        Repeated tiles are of image keys alone, and whole.
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
    """Heads that fill a column of lanes between them, or None where they cannot."""
    if head_dim % LANES == 0:
        return 1
    group = LANES // head_dim
    return group if LANES % head_dim == 0 and heads % group == 0 else None


def dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    """A product accumulated in float32; float32 operands keep all their bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def query_positions(problem: Problem, first: int | Array) -> Int[Array, "1 q"]:
    """The index of each query of the block that begins at query `first`, along lanes."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (1, problem.query_block), 1)


def row_numbers(tile: Tile) -> Int[Array, "k 1"]:
    """The position of each key of a tile, along sublanes."""
    return tile.start + jax.lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0)


def only_head(x: Float[Array, "r w"], problem: Problem, head: int) -> Float[Array, "r w"]:
    """`x` with zeros in the other heads' lanes, so that contracting the column is that head's.

    The matrix unit is no faster for fewer lanes, and moving lanes costs.
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
    """What a tile is multiplied by: `text` on its text keys, `other` on its image keys.

    Each is a number, or a row with a value per query; the result is as small as it can be.
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

    What comes next is prepared before what is there is added, so that the matrix unit works on one
    while the vector unit works on the other. Tiles of a loop stand for those `offset` rows further
    on. `carry(None)` gives what `add` keeps outside of references, `carry(value)` takes it back: a
    loop has to hand it on.
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
