"""Cycles of the kernel that normalises and rotates queries and keys, without a TPU.

    python -m benchmarks.norm_rotate_tpu

One tensor of FLUX at 1024 px, 4 images of 512 + 4096 tokens in 24 heads of 128, bfloat16: thousands
of cycles that the code takes, stalls on memory included (`benchmarks.tpu_static`), and the limit
that the memory sets.
"""

from benchmarks import tpu_static as ts  # isort: skip  # before JAX loads libtpu

import re

import jax
import jax.numpy as jnp

from taca_jax.nn.norm_rotate import pallas_tpu
from taca_jax.nn.rope import Rotation
from taca_jax.parallel.chips import CHIPS

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
IMAGES, LENGTH, HEADS, HEAD_DIM = 4, 4608, 24, 128
EPSILON = 1e-6


def run(x, d_out, scale, cos, sin):
    """The result, and the gradient of x."""

    def call(x):
        return pallas_tpu.norm_rotate([x], [scale], [Rotation(cos, sin)], epsilons=(EPSILON,))

    out, pull = jax.vjp(call, x)
    return out, pull(d_out)


def main() -> None:
    x = ts.struct((IMAGES, LENGTH, HEADS, HEAD_DIM))
    table = ts.struct((LENGTH, HEAD_DIM), jnp.float32)
    arguments = (x, x, ts.struct((HEAD_DIM,), jnp.float32), table, table)
    print("| chip | pass | k cycles | limit |\n|---|---|---|---|")
    for name, topology in TOPOLOGIES.items():
        chip = CHIPS[name]
        for kernel in ts.measure(run, *arguments, topology=topology):
            direction = re.search(r"norm_rotate_(forward|backward)", kernel.name)
            if direction is None:
                continue
            limit = kernel.hbm_bytes / ts.core_bandwidth(chip) * chip.clock
            taken = kernel.cycles + kernel.stall
            print(f"| {name} | {direction[1]} | {taken / 1e3:.0f} | {limit / 1e3:.0f} |")


if __name__ == "__main__":
    main()
