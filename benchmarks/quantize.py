"""The effect of 8 and 4 bits on a FLUX forward pass: error, memory, and time on the CPU.

    python -m benchmarks.quantize [--rounds N] [--json FILE]

Models are random (kernels normal, with outputs of variance 1) and in float32, so that errors,
||quantised - plain|| / ||plain||, come from quantisation only. Rounds alternate between the three
formats, so that other load on the machine affects all alike; times are CPU time of all threads.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from taca_jax.families.flux.model import FLUX_DEV, FLUX_KIND, FluxConfig, FluxTransformer
from taca_jax.nn.kinds import abstract_model, filled, flat_params
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.quantization import quantize

KINDS: tuple[Quantization, ...] = ("none", "int8", "nf4")


@dataclass(frozen=True)
class Case:
    """One model on `rows` x `rows` image tokens and `text` text tokens."""

    name: str
    config: FluxConfig
    rows: int
    text: int


CASES = (
    Case(
        "FLUX.1's width (3072), 1 + 1 blocks",
        replace(FLUX_DEV, num_double_blocks=1, num_single_blocks=1),
        rows=16,
        text=64,
    ),
    Case(
        "1024 wide, 4 + 8 blocks",
        replace(FLUX_DEV, num_heads=8, num_double_blocks=4, num_single_blocks=8),
        rows=16,
        text=64,
    ),
)


@dataclass(frozen=True)
class Result:
    """kernels: their format. cpu: milliseconds per forward pass."""

    name: str
    kernels: str
    relative_error: float
    bytes_per_parameter: float
    cpu: float


def random_model(config: FluxConfig) -> FluxTransformer:
    model, rng = abstract_model(config, dtype=jnp.float32), np.random.default_rng(0)

    def drawn(name: str, shape: tuple[int, ...]) -> jax.Array:
        noise = rng.standard_normal(shape, np.float32)
        match name.rpartition(".")[2]:
            case "kernel":
                noise /= shape[-2] ** 0.5
            case "scale":
                noise = 1 + 0.1 * noise
            case _:
                noise *= 0.1
        return jnp.asarray(noise)

    params = flat_params(model)
    return filled(model, {name: drawn(name, param.shape) for name, param in params.items()})


def stored_bytes(model: FluxTransformer) -> float:
    """Bytes of all parameters; a TPU packs two 4-bit numbers into a byte."""
    arrays = [param.get_value() for param in flat_params(model).values()]
    return sum(a.size * (0.5 if a.dtype == jnp.uint4 else a.dtype.itemsize) for a in arrays)


def forward(model: FluxTransformer, case: Case) -> Callable[[], jax.Array]:
    graph, state = nnx.split(model)
    config, rng = case.config, np.random.default_rng(1)
    side = case.rows * config.patch_size
    shapes = ((side, side, config.latent_channels), (case.text, config.txt_dim))
    latents, txt, pooled = (
        jnp.asarray(rng.standard_normal((1, *shape), np.float32))
        for shape in (*shapes, (config.pooled_dim,))
    )
    timestep, guidance = jnp.full(1, 980.0), jnp.full(1, 3.5)

    @jax.jit
    def run(state: nnx.State) -> jax.Array:
        return nnx.merge(graph, state)(latents, timestep, txt, pooled, guidance=guidance)

    return lambda: jax.block_until_ready(run(state))


def measure(case: Case, rounds: int) -> list[Result]:
    runs, sizes = {}, {}
    parameters = 0
    for kind in KINDS:
        model = random_model(case.config)
        parameters = sum(param.size for param in flat_params(model).values())
        quantize(model, FLUX_KIND, kind)
        runs[kind], sizes[kind] = forward(model, case), stored_bytes(model)
    outputs = {kind: np.asarray(run(), np.float64) for kind, run in runs.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, run in runs.items():
            start = time.process_time()
            run()
            times[kind].append(1000 * (time.process_time() - start))
    plain = outputs["none"]
    return [
        Result(
            case.name,
            kind,
            float(np.linalg.norm(outputs[kind] - plain) / np.linalg.norm(plain)),
            sizes[kind] / parameters,
            statistics.median(times[kind]),
        )
        for kind in KINDS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds per case")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    print(f"{'':40}{'kernels':>8}{'error':>10}{'bytes a parameter':>20}{'CPU ms':>10}{'ratio':>7}")
    results = []
    for case in CASES:
        found = measure(case, args.rounds)
        results += found
        for r in found:
            print(f"{r.name:40}{r.kernels:>8}{r.relative_error:10.1e}", end="")
            print(
                f"{r.bytes_per_parameter:20.2f}{r.cpu:10.0f}{r.cpu / found[0].cpu:7.2f}", flush=True
            )
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
