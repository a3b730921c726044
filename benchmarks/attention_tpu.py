"""Joint attention on TPU: our kernel compared with others, per chip, shape and direction.

    python -m benchmarks.attention_tpu [--chips v5e v6e v5p v4] [--shapes flux sd35] [--json FILE]
    python -m benchmarks.attention_tpu --search [--chips v6e] [--shapes flux]

Without a TPU it compiles each kernel with libtpu and counts the cycles of the scheduled program
(`benchmarks.tpu_static` says what that leaves out; differences under 3 % mean nothing). On a
machine with a TPU it times that chip instead. `--search` tries block sizes of ours and prints the
best ones, for `taca_jax/attention/pallas_tpu/blocks.py`.

The others (JAX's and tokamax's) run plain attention at the best of some block sizes, on the
[b, h, s, d] that they take. Where their blocks do not divide the sequence, it is padded, and they
mask the padding by segment. What XLA adds around a kernel is in a column of its own, "around".
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import tpu_static  # first: it sets what libtpu reads when it starts

# isort: split
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

from taca_jax.attention import joint_attention
from taca_jax.attention.pallas_tpu import Blocks, BlockSizes
from taca_jax.attention.pallas_tpu import joint_attention as kernel
from taca_jax.parallel.chips import CHIPS

GAMMA = 1.2
STOCK_MULTIPLE = 512
TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:2x2x1", "v4": "v4:2x2x1"}
DEFAULT_CHIPS = ["v5e", "v6e", "v5p"]


@dataclass(frozen=True)
class Shape:
    """One attention of a model: batch 1, bfloat16."""

    name: str
    heads: int
    head_dim: int
    text: int
    image: int

    @property
    def length(self) -> int:
        return self.text + self.image

    @property
    def padded(self) -> int:
        """What the stock kernels' blocks divide."""
        return -(-self.length // STOCK_MULTIPLE) * STOCK_MULTIPLE

    def segments(self) -> jax.Array | None:
        """Which of the padded tokens belong together; None where there is no padding."""
        if self.padded == self.length:
            return None
        return (jnp.arange(self.padded) >= self.length).astype(jnp.int32)

    def flop(self, products: int) -> float:
        """For that many products over the whole score matrix: 2 forward, 5 more backward."""
        return 2.0 * products * self.heads * self.head_dim * self.length**2


SHAPES = {
    "flux": Shape("FLUX 1024 px", 24, 128, 512, 4096),
    "flux_512": Shape("FLUX 512 px", 24, 128, 512, 1024),
    "flux_wide": Shape("FLUX 768 x 1344 px", 24, 128, 512, 48 * 84),
    "sd35": Shape("SD3.5-Medium 1024 px", 24, 64, 333, 4096),
}

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""q, k, v, gamma [b] -> output, in the layout of the kernel."""


@dataclass(frozen=True)
class Candidate:
    """A kernel with some block sizes.

    heads_first: it takes [b, h, s, d], not [b, s, h * d]. rare_branches: whether branches that
    depend on data are taken when cycles are counted. Ours are for logits that are hardly ever seen;
    splash's has its whole body in one.
    """

    name: str
    attend: Attend
    heads_first: bool
    rare_branches: bool
    sizes: str = ""


@dataclass(frozen=True)
class Row:
    """What one kernel costs; cycles are of the busiest core."""

    chip: str
    shape: str
    direction: str
    kernel: str
    sizes: str
    cycles: int
    around: int
    milliseconds: float
    share_of_peak: float
    spills: int
    vmem_mib: float


def ours(shape: Shape, blocks: BlockSizes | None = None, text: int | None = None) -> Attend:
    """Our kernel on [b, s, h * d]. With a `text` of 0 tokens gamma has nothing to do."""
    text = shape.text if text is None else text

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, gamma: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(1, -1, shape.heads, shape.head_dim) for x in (q, k, v))
        if blocks is None:
            out = joint_attention(q, k, v, text_len=text, gamma=gamma, implementation="pallas")
        else:
            out = kernel(q, k, v, text_len=text, gamma=gamma, blocks=blocks)
        return out.reshape(1, -1, shape.heads * shape.head_dim)

    return attend


def our_candidate(name: str, attend: Attend) -> Candidate:
    return Candidate(name, attend, heads_first=False, rare_branches=False)


def divisors(length: int, *sizes: int) -> list[int]:
    """Those of `sizes` that divide `length`, and `length`."""
    return [size for size in sizes if size < length and length % size == 0] + [length]


def flash_candidates(shape: Shape) -> Iterable[Candidate]:
    scale = shape.head_dim**-0.5
    length = shape.padded
    for queries, keys in itertools.product(
        divisors(length, 512, 768, 1536)[:3], divisors(length, 512, 1536)
    ):
        names = {
            name: queries if "block_q" in name else keys
            for name in flash.BlockSizes.__dataclass_fields__
            if name != "block_b"
        }
        sizes = flash.BlockSizes(block_b=1, **names)

        def attend(q, k, v, gamma, sizes=sizes):
            del gamma
            ids = shape.segments()
            ids = None if ids is None else flash.SegmentIds(q=ids[None], kv=ids[None])
            return flash.flash_attention(q, k, v, None, ids, sm_scale=scale, block_sizes=sizes)

        yield Candidate("jax flash_attention", attend, True, True, f"{queries}, {keys}")


def splash_blocks(queries: int, keys: int, compute: int) -> dict[str, int]:
    """The same forward and backward, under the names that JAX's splash attention and tokamax's
    have."""
    blocks = {"block_q": queries, "block_kv": keys, "block_kv_compute": compute}
    backward = {
        "block_q_dkv": queries,
        "block_kv_dkv": keys,
        "block_kv_dkv_compute": compute,
    }
    return blocks | backward


def splash_candidates(shape: Shape) -> Iterable[Candidate]:
    scale = shape.head_dim**-0.5
    length = shape.padded
    full = mask.MultiHeadMask([mask.FullMask((length, length)) for _ in range(shape.heads)])
    for queries, keys, compute in itertools.product(
        divisors(length, 512, 768, 1536)[:3], divisors(length, 768, 1536), (256, 512, 768)
    ):
        if keys % compute:
            continue
        blocks = splash_blocks(queries, keys, compute)
        sizes = splash.BlockSizes(**blocks, use_fused_bwd_kernel=True)

        def attend(q, k, v, gamma, sizes=sizes):
            del gamma
            ids = shape.segments()
            ids = None if ids is None else splash.SegmentIds(q=ids, kv=ids)
            run = splash.make_splash_mha(full, block_sizes=sizes, head_shards=1, q_seq_shards=1)
            run = functools.partial(run, segment_ids=ids)
            return jax.vmap(run)((q * scale).astype(q.dtype), k, v)

        yield Candidate("jax splash_attention", attend, True, True, f"{queries}, {keys}, {compute}")


def tokamax_candidates(shape: Shape) -> Iterable[Candidate]:
    """tokamax's own splash attention, where tokamax is installed and there is no padding to mask.

    Called directly: its public API would take blocks of 128, or measure some on a TPU.
    """
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel,
            splash_attention_mask,
        )
    except ImportError:
        return
    length = shape.padded
    if shape.segments() is not None:
        return
    full = splash_attention_mask.FullMask((length, length))
    for queries, keys, compute, scheduler in itertools.product(
        divisors(length, 768, 1536)[:2], divisors(length, 1536), (256, 512, 768), (False, True)
    ):
        blocks = splash_blocks(queries, keys, compute)
        config = splash_attention_kernel.SplashConfig(
            **blocks, use_experimental_scheduler=scheduler
        )

        def attend(q, k, v, gamma, config=config):
            del gamma
            run = splash_attention_kernel.make_splash_mha(full, config=config, q_seq_shards=1)
            return jax.vmap(run)((q * shape.head_dim**-0.5).astype(q.dtype), k, v)

        sizes = f"{queries}, {keys}, {compute}{', scheduler' * scheduler}"
        yield Candidate("tokamax splash", attend, True, True, sizes)


def with_gradients(attend: Attend) -> Callable[..., tuple]:
    """The output and the gradients of q, k and v, from a gradient of the output."""

    def run(q, k, v, gamma, d_out):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, gamma), q, k, v)
        return out, pull(d_out)

    return run


def arguments(shape: Shape, heads_first: bool) -> list[jax.ShapeDtypeStruct]:
    """q, k, v, gamma and the output's gradient."""
    size = (1, shape.length, shape.heads * shape.head_dim)
    if heads_first:
        size = (1, shape.heads, shape.padded, shape.head_dim)
    tensor = tpu_static.struct(size, "bfloat16")
    return [tensor, tensor, tensor, tpu_static.struct((1,), "float32"), tensor]


def counted(chip: str, shape: Shape, direction: str, candidate: Candidate) -> Row:
    """Compiles one candidate for a chip and counts."""
    backward = direction == "forward + backward"
    run = with_gradients(candidate.attend) if backward else candidate.attend
    given = arguments(shape, candidate.heads_first)
    stats = tpu_static.measure(
        run,
        *(given if backward else given[:4]),
        topology=TOPOLOGIES[chip],
        rare_branches=candidate.rare_branches,
    )
    # Kernels are told from XLA's own fusions and copies by their matrix products.
    kernels = [k for k in stats if k.unit_ops.get("MATMUL", 0)]
    total = sum(k.cycles + k.stall for k in kernels)
    around = sum(k.cycles + k.stall for k in stats if k not in kernels)
    if not total:
        raise RuntimeError(f"no kernel with a matrix product among {[k.name for k in stats]}")
    figures = CHIPS[chip]
    ideal = shape.flop(7 if backward else 2) / figures.core_flop_per_cycle / figures.cores
    return Row(
        chip=chip,
        shape=shape.name,
        direction=direction,
        kernel=candidate.name,
        sizes=candidate.sizes,
        cycles=total,
        around=around,
        milliseconds=total / figures.clock * 1e3,
        share_of_peak=ideal / total,
        spills=sum(k.spills for k in kernels),
        vmem_mib=max(k.vmem for k in kernels) / 2**20,
    )


def timed(chip: str, shape: Shape, direction: str, candidate: Candidate) -> Row:
    """Runs one candidate on this machine's TPU; milliseconds are the median of 20 calls."""
    backward = direction == "forward + backward"
    run = jax.jit(with_gradients(candidate.attend) if backward else candidate.attend)
    given = arguments(shape, candidate.heads_first)
    keys = jax.random.split(jax.random.key(0), len(given))
    values = [
        jnp.full(x.shape, GAMMA)
        if x.dtype == jnp.float32
        else jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, given if backward else given[:4], strict=False)
    ]
    jax.block_until_ready(run(*values))
    samples = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(run(*values))
        samples.append((time.perf_counter() - start) * 1000)
    milliseconds = statistics.median(samples)
    figures = CHIPS[chip]
    cycles = round(milliseconds * figures.clock * 1e-3)
    ideal = shape.flop(7 if backward else 2) / figures.core_flop_per_cycle / figures.cores
    return Row(
        *(chip, shape.name, direction, candidate.name, candidate.sizes),
        *(cycles, 0, milliseconds, ideal / cycles, 0, 0.0),
    )


def compare(chip: str, shape: Shape, direction: str) -> list[Row]:
    """Ours, ours without the feature, and the best of each stock kernel."""
    cost = timed if jax.default_backend() == "tpu" else counted
    rows = [
        cost(chip, shape, direction, Candidate("taca_jax", ours(shape), False, False)),
        cost(
            chip,
            shape,
            direction,
            Candidate("taca_jax, no gamma", ours(shape, text=0), False, False),
        ),
    ]
    for family in (flash_candidates, splash_candidates, tokamax_candidates):
        found = []
        for candidate in family(shape):
            try:
                found.append(cost(chip, shape, direction, candidate))
            except Exception as error:  # a stock kernel that does not compile here has no row
                reason = str(error).strip().splitlines()[0][:100]
                print(f"  {candidate.name} ({candidate.sizes}) left out: {reason}")
        if found:
            rows.append(min(found, key=lambda row: row.cycles))
    return rows


def search(chip: str, shape: Shape) -> None:
    """Prints block sizes with their cycles, the best first.

    All are tried with one block of queries a step, and the best of them with more.
    """
    small = Blocks(768, 256)
    cycles = functools.partial(searched, chip, shape)

    def forward(blocks: Blocks) -> float:
        return cycles("forward", BlockSizes(blocks, small))

    def backward(blocks: Blocks) -> float:
        return cycles("forward + backward", BlockSizes(small, blocks))

    sizes = itertools.product((256, 384, 512, 768, 1024), (128, 256, 512), (1, 2))
    tried = [Blocks(q, k, prefetch=n, unroll=36) for q, k, n in sizes if q <= shape.length]
    both = [
        dataclasses.replace(blocks, transposed=transposed)
        for blocks in tried
        for transposed in (False, True)
        if blocks.queries <= 512 and blocks.keys <= 256
    ]
    for direction, cost, all_blocks in (
        ("forward", forward, tried),
        ("forward + backward", backward, both),
    ):
        found = {blocks: cost(blocks) for blocks in all_blocks}
        for blocks in sorted(found, key=found.__getitem__)[:3]:
            for per_step in (2, 3):
                more = dataclasses.replace(blocks, per_step=per_step)
                found[more] = cost(more)
        print(f"\n{chip}, {shape.name}, {direction}")
        for blocks in sorted(found, key=found.__getitem__)[:8]:
            print(f"  {found[blocks]:12,.0f}  {blocks}")


def searched(chip: str, shape: Shape, direction: str, blocks: BlockSizes) -> float:
    """Cycles, or infinity for sizes that do not compile."""
    try:
        return counted(chip, shape, direction, our_candidate("", ours(shape, blocks))).cycles
    except Exception as error:  # too much for VMEM, mostly
        print(f"  {blocks}: {str(error).strip().splitlines()[0][:100]}")
        return math.inf


def show(rows: list[Row]) -> None:
    first = rows[0]
    print(f"\n{first.chip}, {first.shape}, {first.direction}")
    print(f"{'':24}{'cycles':>12}{'ratio':>7}{'ms':>8}{'of peak':>9}", end="")
    print(f"{'around':>10}{'spills':>11}{'VMEM MiB':>10}  sizes")
    for row in rows:
        print(f"{row.kernel:24}{row.cycles:12,}{row.cycles / first.cycles:7.2f}", end="")
        print(f"{row.milliseconds:8.3f}{row.share_of_peak:9.1%}{row.around:10,}", end="")
        print(f"{row.spills:11,}{row.vmem_mib:10.1f}  {row.sizes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=DEFAULT_CHIPS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["flux", "sd35"])
    parser.add_argument("--search", action="store_true", help="try block sizes instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    shapes = [SHAPES[name] for name in args.shapes]
    if args.search:
        for chip, shape in itertools.product(args.chips, shapes):
            search(chip, shape)
        return
    rows = []
    for chip, shape in itertools.product(args.chips, shapes):
        for direction in ("forward", "forward + backward"):
            found = compare(chip, shape, direction)
            show(found)
            rows += found
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
