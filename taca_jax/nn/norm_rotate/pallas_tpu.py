"""The norm and the rotation on TPU in Pallas: one pass over the tokens, forward and backward.

Tokens are read as products write them, [b, s, heads * head_dim], a block of them with all of their
heads at a time, and written where the joint sequence has them. XLA alone has the products written
in float32, sums over heads in another layout, copies them back and materialises broadcasts in the
backward pass, for two to four times the time. Here it is that of the memory.

A *column* is the 128 lanes, or more, that one head fills or several small heads fill together. The
two channels of each pair are swapped by a product with a permutation matrix: the matrix unit has
nothing else to do, and moving lanes would take longer than all the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from taca_jax.attention.pallas_tpu.target import kernel_vmem, this_chip
from taca_jax.attention.pallas_tpu.tiles import LANES, NN, dot, existing_rows, round_up
from taca_jax.nn.norm_rotate.reference import join
from taca_jax.nn.rope import Rotation

BLOCK_BYTES = 3 * 2**19
"""Of one array's block, at the most. The backward pass has three arrays, each of them twice."""
LEAST_TOKENS, MOST_TOKENS = 16, 256
UNROLLED = 6
"""Columns, at the most, whose operations are interleaved: one alone would wait for latencies."""


@dataclass(frozen=True)
class _Static:
    """What a call is compiled for: the shapes `[s, h, d]` of its parts, and their norms' epsilons.

    rotated: whether there are rotations.
    """

    shapes: tuple[tuple[int, ...], ...]
    epsilons: tuple[float, ...]
    rotated: bool
    interpret: bool

    @property
    def head_dim(self) -> int:
        return self.shapes[0][2]

    @property
    def length(self) -> int:
        """Tokens of the joint sequence."""
        return sum(shape[0] for shape in self.shapes)

    @property
    def offsets(self) -> list[int]:
        """Where each part begins in the joint sequence."""
        lengths = [shape[0] for shape in self.shapes]
        return [sum(lengths[:i]) for i in range(len(lengths))]

    def problems(self, itemsize: int) -> list["_Problem"]:
        """Each part's, in blocks of tokens that begin where the parts do if there are such."""
        heads, head_dim = self.shapes[0][1:]
        room = BLOCK_BYTES // (heads * head_dim * itemsize)
        most = min(max(1 << room.bit_length() - 1, LEAST_TOKENS), MOST_TOKENS)
        sizes = [most >> i for i in range(3) if most >> i >= LEAST_TOKENS]
        tokens = next((n for n in sizes if not any(x % n for x in self.offsets)), None)
        return [
            _Problem(
                length=length,
                head_dim=head_dim,
                epsilon=epsilon,
                rotated=self.rotated,
                tokens=tokens or min(most, round_up(length, LEAST_TOKENS)),
                offset=offset if tokens else None,
                interpret=self.interpret,
            )
            for (length, *_), epsilon, offset in zip(
                self.shapes, self.epsilons, self.offsets, strict=True
            )
        ]


@dataclass(frozen=True)
class _Problem:
    """What the kernels of one part are compiled for.

    tokens: of a block. offset: where the part begins in the joint sequence, a multiple of `tokens`;
    None where that is not possible, and the part is an array of its own.
    """

    length: int
    head_dim: int
    epsilon: float
    rotated: bool
    tokens: int
    offset: int | None
    interpret: bool

    @property
    def column(self) -> int:
        """Lanes of a column."""
        return max(self.head_dim, LANES)

    @property
    def blocks(self) -> int:
        return -(-self.length // self.tokens)

    def call(
        self,
        kernel: Callable[..., None],
        name: str,
        arrays: Sequence[Any],
        in_specs: Sequence[Any],
        results: Sequence[tuple[jax.ShapeDtypeStruct, Any]],
        *,
        passes: int,
        **options: Any,
    ) -> list[jax.Array]:
        """Runs a kernel for every block of tokens of every sample; it reads or writes `passes`
        arrays of the part's size."""
        shapes, specs = zip(*results, strict=True)
        batch, _, width = arrays[0].shape
        return pl.pallas_call(
            partial(kernel, problem=self),
            grid=(self.blocks, batch),
            in_specs=list(in_specs),
            out_specs=list(specs),
            out_shape=list(shapes),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"),
                vmem_limit_bytes=kernel_vmem(this_chip()),
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * batch * self.length * width * self.column,
                transcendentals=batch * self.length * width // self.head_dim,
                bytes_accessed=passes * batch * self.length * width * arrays[0].dtype.itemsize,
            ),
            name=name,
            interpret=self.interpret,
            **options,
        )(*arrays)

    def specs(self, width: int) -> tuple[Any, Any, list[Any]]:
        """The blocks of a part's tokens, of theirs in the joint sequence, and of scale and
        tables."""
        first = (self.offset or 0) // self.tokens
        column = self.column
        own = pl.BlockSpec((1, self.tokens, width), lambda i, b: (b, i, 0))
        joint = pl.BlockSpec((1, self.tokens, width), lambda i, b: (b, i + first, 0))
        table = pl.BlockSpec((self.tokens, column), lambda i, b: (i, 0))
        scale = pl.BlockSpec((1, column), lambda i, b: (0, 0))
        return own, joint, [scale, *[table] * (2 * self.rotated)]


def norm_rotate(
    parts: Sequence[Float[Array, "b _ h d"]],
    scales: Sequence[Float[Array, " d"]],
    rotations: Sequence[Rotation | None],
    *,
    epsilons: tuple[float, ...],
    interpret: bool = False,
) -> Float[Array, "b s h d"]:
    """As `api.norm_rotate`, with each part's scale, epsilon and rotation; heads fill columns of
    lanes."""
    b, _, heads, head_dim = parts[0].shape
    static = _Static(
        tuple(part.shape[1:] for part in parts), epsilons, rotations[0] is not None, interpret
    )
    merged = tuple(part.reshape(*part.shape[:2], -1) for part in parts)
    fill = max(LANES // head_dim, 1)

    def filled(table: Float[Array, "r d"]) -> Float[Array, "r c"]:
        return jnp.tile(table.astype(jnp.float32), (1, fill))

    rows = tuple(filled(scale[None]) for scale in scales)
    tables = tuple(
        () if each is None else (filled(each.cos), filled(each.sin)) for each in rotations
    )
    out: Any = _norm_rotate(merged, rows, tables, static)
    return out.reshape(b, -1, heads, head_dim)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_rotate(parts: Any, scales: Any, tables: Any, static: _Static) -> jax.Array:
    b, _, width = parts[0].shape
    problems = static.problems(parts[0].dtype.itemsize)
    joined = problems[0].offset is not None
    out: list[jax.Array] = []
    for problem, x, scale, own in zip(problems, parts, scales, tables, strict=True):
        part, joint, others = problem.specs(width)
        length = static.length if joined else problem.length
        result = jax.ShapeDtypeStruct((b, length, width), x.dtype)
        arrays, in_specs, options = [x, scale, *own], [part, *others], {}
        if joined and out:  # this part's blocks are written into the parts before it
            options = {"input_output_aliases": {len(arrays): 0}}
            arrays.append(out.pop())
            # The interpreter (of jax 0.12) pads arrays to whole blocks where they have blocks only.
            in_specs.append(joint if problem.interpret else pl.BlockSpec(memory_space=pl.ANY))
        out += problem.call(
            _forward,
            "norm_rotate_forward",
            arrays,
            in_specs,
            [(result, joint)],
            passes=2,
            **options,
        )
    return join([x[:, :, None] for x in out])[:, :, 0] if len(out) > 1 else out[0]


def _with_residuals(
    parts: Any, scales: Any, tables: Any, static: _Static
) -> tuple[jax.Array, tuple]:
    primal = partial(
        jax.tree.map,
        lambda x: x.value,
        is_leaf=lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal),
    )
    # The residuals must be arrays: an empty tuple says yes, None says no.
    wanted = tuple(() if scale.perturbed else None for scale in scales)
    inputs = primal(parts), primal(scales), primal(tables)
    return _norm_rotate(*inputs, static), (*inputs, wanted)


def _gradients(static: _Static, residuals: tuple, d_out: Any) -> tuple:
    parts, scales, tables, wanted = residuals
    b, _, width = parts[0].shape
    if isinstance(d_out, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    d_parts, d_scales = [], []
    problems = static.problems(parts[0].dtype.itemsize)
    for i, (problem, x, scale, own) in enumerate(zip(problems, parts, scales, tables, strict=True)):
        part, joint, others = problem.specs(width)
        start, d = static.offsets[i], d_out
        if problem.offset is None:
            d = d_out[:, start : start + problem.length]
        results = [(jax.ShapeDtypeStruct(x.shape, x.dtype), part)]
        if wanted[i] is not None:
            shape = jax.ShapeDtypeStruct((problem.blocks, b, 1, problem.column), jnp.float32)
            spec = pl.BlockSpec((1, 1, 1, problem.column), lambda i, b: (i, b, 0, 0))
            results.append((shape, spec))
        d_part, *sums = problem.call(
            _backward,
            "norm_rotate_backward",
            [x, d, scale, *own],
            [part, joint, *others],
            results,
            passes=3,
        )
        d_parts.append(d_part)
        d_scales.append(sums[0].sum((0, 1)) if sums else jnp.zeros_like(scale))
    return tuple(d_parts), tuple(d_scales), jax.tree.map(jnp.zeros_like, tables)


_norm_rotate.defvjp(_with_residuals, _gradients, symbolic_zeros=True)


def _forward(x_ref: Any, scale_ref: Any, *refs: Any, problem: _Problem) -> None:
    scale, out_ref = scale_ref[...], refs[-1]
    rotate = _rotation(refs, problem)

    def column(lanes: Any, _: None) -> None:
        x = x_ref[0, :, lanes].astype(jnp.float32)
        y = (x * _inverse_rms(x, problem) * scale).astype(out_ref.dtype)
        out_ref[0, :, lanes] = rotate(y, 1).astype(out_ref.dtype)

    _for_columns(x_ref.shape[-1], problem, column, None)


def _backward(x_ref: Any, d_ref: Any, scale_ref: Any, *refs: Any, problem: _Problem) -> None:
    scale, (dx_ref, *d_scale_refs) = scale_ref[...], refs[2 * problem.rotated :]
    rotate = _rotation(refs, problem)
    row = pl.program_id(0) * problem.tokens

    def column(lanes: Any, d_scale: Float[Array, "1 c"]) -> Float[Array, "1 c"]:
        d = rotate(d_ref[0, :, lanes], -1)
        x = x_ref[0, :, lanes].astype(jnp.float32)
        inverse = _inverse_rms(x, problem)
        x = x * inverse
        if d_scale_refs:
            d_scale += existing_rows(d * x, row, problem.length).sum(0, keepdims=True)
        d = d * scale
        dx = inverse * (d - x * _head_means(d * x, problem))
        dx_ref[0, :, lanes] = dx.astype(dx_ref.dtype)
        return d_scale

    d_scale = _for_columns(x_ref.shape[-1], problem, column, jnp.zeros_like(scale))
    for ref in d_scale_refs:
        ref[0, 0] = d_scale


def _for_columns(width: int, problem: _Problem, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`carry = body(lanes, carry)` for the lanes of each column."""
    columns = width // problem.column
    together = max(n for n in range(1, UNROLLED + 1) if columns % n == 0)

    def step(i: Array, carry: Any) -> Any:
        start = pl.multiple_of(i * problem.column, LANES)
        return body(pl.ds(start, problem.column), carry)

    return jax.lax.fori_loop(0, columns, step, carry, unroll=together)


def _rotation(tables: Sequence[Any], problem: _Problem) -> Callable[[Array, int], Array]:
    """What rotates a column forwards (1) or back (-1), by the tables that references begin with;
    the result is float32."""
    if not problem.rotated:
        return lambda x, _: x.astype(jnp.float32)
    cos, sin = (ref[...] for ref in tables[:2])
    square = (problem.column, problem.column)
    lane, partner = (jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))

    def rotate(x: Float[Array, "r c"], direction: int) -> Float[Array, "r c"]:
        swapped = dot(x, (lane == partner ^ 1).astype(x.dtype), NN)
        return x.astype(jnp.float32) * cos + direction * (swapped * sin)

    return rotate


def _inverse_rms(x: Float[Array, "r c"], problem: _Problem) -> Float[Array, "r _"]:
    return jax.lax.rsqrt(_head_means(x * x, problem) + problem.epsilon)


def _head_means(x: Float[Array, "r c"], problem: _Problem) -> Float[Array, "r _"]:
    """The mean over the channels of its head, for every channel of a column."""
    heads = problem.column // problem.head_dim
    if heads == 1:
        return x.mean(-1, keepdims=True)
    head = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // problem.head_dim
    means = jnp.zeros_like(x)
    for i in range(heads):
        own = jnp.where(head == i, x, 0).sum(-1, keepdims=True) / problem.head_dim
        means = jnp.where(head == i, own, means)
    return means
