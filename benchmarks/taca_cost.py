"""Times plain attention against TACA in whole models: what gamma costs (the paper's table 6).

    python -m benchmarks.taca_cost [--case NAME ...] [--steps N ...] [--rounds N] [--threads N]
        [--json FILE]

Sampling steps with TACA (gamma 1.2), and with gamma 1 in the same compiled program, against a
program that is compiled without any gamma; one step and thirty, with every implementation of the
attention that this device has. All three run in turn in every round, each from the same inputs, so
that other load on the machine affects them alike. The ratio of plain sampling in TACA's program is
what noise does: the two differ in data only. The CPU time of all threads is shown too: where the
model runs on the CPU, other programs on the machine disturb it less. FLOPs are XLA's count for the
compiled programs, which does not look into kernels.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import shapes_base
from taca_jax.attention import Implementation
from taca_jax.families.flux.model import FLUX_SCHNELL
from taca_jax.families.sd3.model import SD35_MEDIUM
from taca_jax.nn.kinds import kind_of

GAMMA = 1.2
SECONDS = 0.3
"""Of each program in each round, at least."""


@dataclass(frozen=True)
class Case:
    """A model at one input size: `rows` x `rows` image tokens, `text` text tokens."""

    config: Any
    batch: int
    rows: int
    text: int


CASES = {
    "shapes": Case(shapes_base.CONFIG.model, batch=8, rows=10, text=16),
    # FLUX.1's heads and lengths at 512 px, and those of Stable Diffusion 3.5-Medium; fewer layers.
    "flux": Case(
        replace(FLUX_SCHNELL, num_heads=8, num_double_blocks=2, num_single_blocks=4),
        batch=1,
        rows=32,
        text=512,
    ),
    "sd35": Case(
        replace(SD35_MEDIUM, num_heads=8, num_layers=4, num_dual_layers=2),
        batch=1,
        rows=32,
        text=333,
    ),
}


@dataclass(frozen=True)
class Result:
    """Medians over rounds: milliseconds without gamma, and ratios to it in the same round.

    taca, plain: with gamma as data, 1.2 and 1. cpu: the same of all threads' time. flops: of the
    program with gamma.
    """

    case: str
    implementation: str
    steps: int
    without_ms: float
    taca: float
    plain: float
    taca_cpu: float
    plain_cpu: float
    flops: float


def implementations() -> Sequence[Implementation]:
    """Of the attention, on this device."""
    match jax.default_backend():
        case "tpu":
            return ("pallas", "chunked")
        case "gpu":
            return ("split", "chunked")
        case _:
            return ("chunked", "split", "reference")


def programs(
    case: Case, implementation: Implementation, steps: int
) -> tuple[dict[str, Callable], float]:
    """Compiled Euler steps of a model, to be called without arguments: `without` any gamma, and
    `plain` and `taca`, which are one program; and its FLOPs, relative to those without gamma."""
    config, on_cpu = case.config, jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    model = kind_of(config).module(
        config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, attention=implementation
    )
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    side = case.rows * config.patch_size

    def noise(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((case.batch, *shape), np.float32))

    latents = noise(side, side, config.latent_channels)
    txt, pooled = noise(case.text, config.txt_dim), noise(config.pooled_dim)

    def run(state: nnx.State, latents: jax.Array, gamma: jax.Array | None) -> jax.Array:
        model = nnx.merge(graph, state)

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            time = jnp.full(case.batch, 1000.0) * (1 - i / steps)
            return x - model(x, time, txt, pooled, gamma=gamma) / steps

        return jax.lax.fori_loop(0, steps, step, latents)

    ones = jnp.ones(case.batch)
    without, with_gamma = (
        jax.jit(run).lower(state, latents, gamma).compile() for gamma in (None, ones)
    )

    def call(program: Callable, gamma: jax.Array | None) -> Callable[[], jax.Array]:
        return lambda: jax.block_until_ready(program(state, latents, gamma))

    calls = {
        "without": call(without, None),
        "plain": call(with_gamma, ones),
        "taca": call(with_gamma, GAMMA * ones),
    }
    for name in calls:
        calls[name]()
    flops = with_gamma.cost_analysis()["flops"] / without.cost_analysis()["flops"]
    return calls, flops


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Wall and CPU milliseconds of one call, the mean of `repeats`."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return (
        (time.perf_counter() - wall) * 1000 / repeats,
        (time.process_time() - cpu) * 1000 / repeats,
    )


def measure(name: str, implementation: Implementation, steps: int, rounds: int) -> Result:
    """Times one case in rounds, in which the order of the three programs rotates."""
    calls, flops = programs(CASES[name], implementation, steps)
    repeats = max(1, round(SECONDS * 1000 / timed(calls["without"], 1)[0]))
    order = list(calls)
    samples = []
    for i in range(rounds):
        turn = order[i % 3 :] + order[: i % 3]
        samples.append({each: timed(calls[each], repeats) for each in turn})

    def ratio(which: str, clock: int) -> float:
        return statistics.median(s[which][clock] / s["without"][clock] for s in samples)

    return Result(
        case=name,
        implementation=implementation,
        steps=steps,
        without_ms=statistics.median(s["without"][0] for s in samples),
        taca=ratio("taca", 0),
        plain=ratio("plain", 0),
        taca_cpu=ratio("taca", 1),
        plain_cpu=ratio("plain", 1),
        flops=flops,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 30], help="sampling steps")
    parser.add_argument("--rounds", type=int, default=9, help="of each program")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of XLA on the CPU")
    args = parser.parse_args()
    os.environ["NPROC"] = str(args.threads)  # XLA reads it when its CPU client starts

    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}; medians of {args.rounds} rounds")
    print("ratios to the program without gamma: TACA's, and plain sampling's in the same program\n")
    print(f"{'case':8}{'attention':12}{'steps':>6}{'without':>12}{'TACA':>8}{'plain':>8}", end="")
    print(f"{'CPU: TACA':>12}{'plain':>8}{'FLOPs':>10}")
    results = []
    for name in args.case:
        for implementation in implementations():
            for steps in args.steps:
                r = measure(name, implementation, steps, args.rounds)
                results.append(r)
                print(f"{r.case:8}{r.implementation:12}{r.steps:6}{r.without_ms:9.1f} ms", end="")
                print(f"{r.taca:8.3f}{r.plain:8.3f}", end="")
                print(f"{r.taca_cpu:12.3f}{r.plain_cpu:8.3f}{r.flops:10.5f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
