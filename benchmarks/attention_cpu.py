"""Joint attention on the CPU: ours (`auto`) against PyTorch's scaled_dot_product_attention.

    python -m benchmarks.attention_cpu [--rounds N] [--threads N] [--json FILE]

FLUX's heads (24 of 128 channels), 512 text and 1024 image tokens, float32; forward, and forward +
backward. Both run in this process with the same number of threads, in alternating rounds. Before
anything is timed, outputs and gradients are compared, at gamma 1, which is what PyTorch computes.
Last comes how much memory XLA plans for our forward + backward, besides inputs and results, as the
sequence doubles.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from taca_jax.attention import joint_attention

HEADS, HEAD_DIM, TEXT, IMAGE = 24, 128, 512, 1024
MAX_RELATIVE_ERROR = 1e-5
SPINNING = 0.3
"""Seconds to wait before a call: PyTorch's OpenMP threads go on looking for work after theirs (for
0.2 by default), on cores that ours needs."""
MEMORY_LENGTHS = (1536, 3072, 6144)


@dataclass(frozen=True)
class Result:
    """Milliseconds per call, medians; ratios are ours / PyTorch's, below 1 where ours is faster."""

    direction: str
    threads: int
    relative_error: float
    ours_wall: float
    torch_wall: float
    wall_ratio: float
    ours_cpu: float
    torch_cpu: float
    cpu_ratio: float


def drawn(length: int) -> list[np.ndarray]:
    """q, k, v and the output's gradient, [1, s, h, d]."""
    rng = np.random.default_rng(0)
    shape = (1, length, HEADS, HEAD_DIM)
    return [rng.standard_normal(shape, np.float32) for _ in range(4)]


def our_call(backward: bool) -> Callable:
    """From q, k, v, the output's gradient: the output, and gradients of q, k, v where asked for."""
    gamma = jnp.ones(1)

    @jax.jit
    def run(q, k, v, d_out):
        def attend(q, k, v):
            return joint_attention(q, k, v, text_len=TEXT, gamma=gamma)

        if not backward:
            return [attend(q, k, v)]
        out, pull = jax.vjp(attend, q, k, v)
        return [out, *pull(d_out)]

    return run


def prepare(backward: bool) -> tuple[Callable[[], list], Callable[[], list]]:
    """Our call and PyTorch's, each on its own copy of the inputs."""
    arrays = drawn(TEXT + IMAGE)
    given = [jnp.asarray(x) for x in arrays]
    run = our_call(backward)
    # PyTorch takes [b, h, s, d]; its models, too, hold that as a view of [b, s, h, d].
    q, k, v, d_out = (torch.tensor(x).transpose(1, 2) for x in arrays)

    def ours() -> list:
        return jax.block_until_ready(run(*given))

    def theirs() -> list:
        with torch.set_grad_enabled(backward):
            inputs = [x.detach().requires_grad_(backward) for x in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(*inputs)
            gradients = torch.autograd.grad(out, inputs, d_out) if backward else ()
        return [out, *gradients]

    return ours, theirs


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU milliseconds of a call after another of its kind, as in a model's blocks."""
    time.sleep(SPINNING)
    run()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) * 1000, (time.process_time() - cpu) * 1000


def measure(backward: bool, rounds: int, threads: int) -> Result:
    """Times one direction in alternating rounds. Raises RuntimeError when the results differ."""
    direction = "forward + backward" if backward else "forward"
    ours, theirs = prepare(backward)
    error = max(
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for a, b in zip(
            map(np.asarray, ours()),
            (x.detach().transpose(1, 2).numpy() for x in theirs()),
            strict=True,
        )
    )
    if not error <= MAX_RELATIVE_ERROR:
        raise RuntimeError(f"{direction}: results differ by {error:.1e} relative; nothing is timed")
    samples = [(*timed(ours), *timed(theirs)) for _ in range(rounds)]
    wall, cpu, torch_wall, torch_cpu = (statistics.median(x) for x in zip(*samples, strict=True))
    return Result(
        direction=direction,
        threads=threads,
        relative_error=error,
        ours_wall=wall,
        torch_wall=torch_wall,
        wall_ratio=wall / torch_wall,
        ours_cpu=cpu,
        torch_cpu=torch_cpu,
        cpu_ratio=cpu / torch_cpu,
    )


def planned_memory(length: int) -> float:
    """MiB of temporary buffers that forward + backward takes."""
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in drawn(length)]
    program = our_call(backward=True).lower(*given).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds per direction")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each library")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    os.environ["NPROC"] = str(args.threads)  # XLA reads it when its CPU client starts
    torch.set_num_threads(args.threads)

    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{TEXT} + {IMAGE} tokens, {HEADS} heads of {HEAD_DIM}, float32; ms, medians\n")
    print(f"{'':20}{'wall ours':>10}{'torch':>9}{'ratio':>7}", end="")
    print(f"{'CPU ours':>11}{'torch':>9}{'ratio':>7}{'error':>10}")
    results = []
    for backward in (False, True):
        r = measure(backward, args.rounds, args.threads)
        results.append(r)
        print(f"{r.direction:20}{r.ours_wall:10.1f}{r.torch_wall:9.1f}{r.wall_ratio:7.2f}", end="")
        print(f"{r.ours_cpu:11.1f}{r.torch_cpu:9.1f}{r.cpu_ratio:7.2f}", end="")
        print(f"{r.relative_error:10.1e}", flush=True)

    print("\ntemporary memory of forward + backward, MiB")
    memory = {}
    for length in MEMORY_LENGTHS:
        memory[length] = planned_memory(length)
        scores = HEADS * length**2 * 4 / 2**20
        print(f"{length:6} tokens {memory[length]:8.0f}   (all scores: {scores:,.0f})", flush=True)
    if args.json:
        figures = {"times": [asdict(r) for r in results], "temporary_mib": memory}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
