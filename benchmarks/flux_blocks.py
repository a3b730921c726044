"""The share of a chip's peak that FLUX.1's blocks reach, counted in their compiled code; no TPU.

    python -m benchmarks.flux_blocks v6e --images 4 --remat attention
    python -m benchmarks.flux_blocks v6e --images 4 --sampling

Compiles a loop of a few double and one of a few single blocks, as the model runs them, at full
width and 1024 px (512 + 4096 tokens) for one chip: forward and backward with LoRA factors of rank
64 on the attention's projections, or (--sampling) forward alone. Prints for a block of each kind,
and for the 19 + 38 of the model together, milliseconds by the cycles of the code
(`benchmarks.tpu_static`, which says what it leaves out) and by the compiler's estimate, and the
share of the peak of the matrix units, for which forward pass and input gradients count and nothing
that is computed again. What surrounds the blocks (embeddings, the optimizer, what chips say to each
other) is left out, and so is whether the memory of all blocks fits: `plan` says that. Compiling
takes one to five minutes of CPU for each kind of block.
"""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Read by libtpu when it is loaded: only what is counted is written, which is 1/20 of all.
os.environ["LIBTPU_INIT_ARGS"] = (
    os.environ.get("LIBTPU_INIT_ARGS", "") + " --xla_jf_dump_llo_pass_label_regex=.*"
    "(packed-bundles-post-ra|bundle-packing-post-ra|pre-delay_hlo-static).*"
)

from benchmarks.tpu_static import DUMP  # isort: skip  # before JAX loads libtpu

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from benchmarks.step_operations import LONGEST_SOURCE, counted
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import FLUX_DEV, DoubleBlock, FluxInputs, SingleBlock
from taca_jax.nn.fusion import step_options
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import attach, linears
from taca_jax.nn.rope import joint_rotation
from taca_jax.nn.stacking import KEPT, Remat, make_stack, run_stack
from taca_jax.parallel.chips import CHIPS, Chip
from taca_jax.planning.operations import operations

TEXT, SIDE, RANK = 512, 64, 64
DEPTH = 5  # more than the model unrolls
LENGTH, HIDDEN = TEXT + SIDE**2, FLUX_DEV.hidden
KINDS: dict[str, tuple[type[nnx.Module], int, tuple[int, ...]]] = {
    "double": (DoubleBlock, FLUX_DEV.num_double_blocks, (SIDE**2, TEXT)),
    "single": (SingleBlock, FLUX_DEV.num_single_blocks, (LENGTH,)),
}
"""Each with how many the model has, and the lengths of what it takes and returns."""
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
DTYPE = jnp.dtype("bfloat16")


def block_flops(images: int, passes: int) -> float:
    """Of either kind of block: its products and its attention."""
    products = 12 * HIDDEN**2 * LENGTH
    return 2.0 * passes * images * (products + 2 * LENGTH**2 * HIDDEN)


def make_stack_of(name: str, *, lora: bool) -> nnx.Module:
    """DEPTH blocks of that kind, with LoRA factors on the attention's projections."""
    make = partial(KINDS[name][0], FLUX_DEV, param_dtype=DTYPE, dtype=DTYPE)
    stack = make_stack(make, DEPTH, rngs=nnx.Rngs(0))
    for path, layer in linears(stack) if lora else ():
        if any(re.fullmatch(target, f"{name}_blocks.{path}") for target in ATTENTION_TARGETS):
            _, inputs, outputs = layer.kernel.shape
            attach(layer, jnp.zeros((DEPTH, inputs, RANK)), jnp.zeros((DEPTH, RANK, outputs)), 1.0)
    return stack


def compiled(name: str, chip: str, images: int, remat: Remat, *, sampling: bool) -> str:
    """The text of the program of DEPTH blocks, in the model's own loops."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = jax.sharding.Mesh(topology.devices[:1], ("one",))
    place = jax.sharding.NamedSharding(mesh, jax.P())

    def array(*shape: int, dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), tree)

    stack = nnx.eval_shape(partial(make_stack_of, name, lora=not sampling))
    graph, trained, frozen = nnx.split(stack, LoRAParam, ...)
    table = partial(
        joint_rotation, TEXT, SIDE, SIDE, axes_dim=FLUX_DEV.axes_dim, theta=FLUX_DEV.theta
    )
    vec, number = array(images, HIDDEN), array(images, dtype=jnp.float32)
    streams = tuple(array(images, length, HIDDEN) for length in KINDS[name][2])
    rest = placed(frozen), vec, number, placed(jax.eval_shape(table))

    def forward(trained: Any, streams: Any, frozen: Any, vec: Any, number: Any, table: Any) -> Any:
        inputs = FluxInputs(
            vec=vec,
            text_len=TEXT,
            gamma=number,
            lora_scale=None if sampling else number,
            attention="auto",
            rotation=table,
        )

        def call(block: Any, carry: Any) -> Any:
            out = block(*carry, inputs)
            return out if isinstance(out, tuple) else (out,)

        stack = nnx.merge(graph, trained, frozen)
        return run_stack(stack, call, streams, remat="none" if sampling else remat)

    def both(trained: Any, streams: Any, d_out: Any, *rest: Any) -> Any:
        out, pull = jax.vjp(lambda *x: forward(*x, *rest), trained, streams)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        run = jax.jit(forward if sampling else both, compiler_options=step_options())
        d_out = () if sampling else (streams,)
        return run.lower(placed(trained), streams, *d_out, *rest).compile().as_text() or ""


def measured(
    name: str, chip: Chip, images: int, remat: Remat, *, sampling: bool
) -> tuple[float, float]:
    """Seconds of a block by its code and by the compiler's estimate; prints its operations."""
    for file in Path(DUMP).glob("*"):
        file.unlink()
    text = compiled(name, chip.name, images, remat, sampling=sampling)
    # Those of a loop's body, each once: what surrounds the loops is not of the blocks.
    found = [
        replace(each, times=each.times // DEPTH)
        for each in operations(text, chip)
        if each.times >= DEPTH
    ]
    code = counted(found, Path(DUMP), chip)
    print(f"{name} block, operations of 2 % and more: k cycles, limit, shape, from")
    whole = sum(each.times * each.seconds for each in code)
    for each in code:
        if each.seconds >= 0.02 * whole:
            cycles = (each.seconds * chip.clock / 1e3, each.limit(chip) * chip.clock / 1e3)
            source = each.source[-LONGEST_SOURCE:]
            print(f"  {each.name:32} {cycles[0]:7,.0f} {cycles[1]:7,.0f}  {each.shape} {source}")
    return whole, sum(each.times * each.seconds for each in found)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chip", choices=TOPOLOGIES)
    parser.add_argument("--images", type=int, default=4, help="on the chip")
    parser.add_argument("--remat", choices=KEPT, default="attention")
    parser.add_argument("--sampling", action="store_true", help="the forward pass alone")
    arguments = parser.parse_args(argv)
    chip = CHIPS[arguments.chip]
    flops = block_flops(arguments.images, passes=1 if arguments.sampling else 2)
    rows, together = [], (0.0, 0.0)
    for name, (_, count, _) in KINDS.items():
        seconds = measured(
            name, chip, arguments.images, arguments.remat, sampling=arguments.sampling
        )
        rows.append((f"{name} block", 1, seconds))
        together = tuple(a + count * b for a, b in zip(together, seconds, strict=True))
    rows.append(("19 + 38 blocks", sum(count for _, count, _ in KINDS.values()), together))
    print("| | by its code | of the peak | by the estimate | of the peak |")
    print("|---|---|---|---|---|")
    for label, count, times in rows:
        cells = [f"{1e3 * t:.1f} ms | {count * flops / (t * chip.flops):.1%}" for t in times]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
