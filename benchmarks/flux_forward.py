"""Times a FLUX forward pass on the CPU, ours against diffusers', with the same weights and inputs.

    python -m benchmarks.flux_forward [--rounds N] [--threads N] [--json FILE]

Both run in this process, in float32, on all cores. The outputs are compared before anything is
timed. Rounds alternate between the two, so that other load on the machine affects both alike. The
CPU time of all threads is shown beside the wall time. On a busy machine neither is fair with
several threads, because PyTorch's threads spin while they wait: use `--threads 1` there.
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
import torch
from diffusers import FluxTransformer2DModel
from flax import nnx

from configs import shapes_base
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.flux.model import FluxConfig, FluxTransformer
from taca_jax.formats.engine import exported
from taca_jax.formats.tensor_files import ArrayTensors
from taca_jax.nn.kinds import flat_params
from taca_jax.nn.layers import patchify

MAX_RELATIVE_ERROR = 1e-4

# diffusers fixes theta to that of the large models; it does not change the amount of work.
SHAPES = replace(shapes_base.CONFIG.model, theta=10_000)
MIDDLE = FluxConfig(
    patch_size=2,
    latent_channels=16,
    num_heads=8,
    head_dim=128,
    axes_dim=(16, 56, 56),
    theta=10_000,
    num_double_blocks=2,
    num_single_blocks=4,
    mlp_ratio=4.0,
    txt_dim=4096,
    pooled_dim=768,
    guidance_embed=True,
)


@dataclass(frozen=True)
class Case:
    """One model at one input size: `rows` x `rows` image tokens, `text` text tokens."""

    name: str
    config: FluxConfig
    batch: int
    rows: int
    text: int


CASES = (
    Case("shapes model, batch 1", SHAPES, batch=1, rows=10, text=16),
    Case("shapes model, batch 32", SHAPES, batch=32, rows=10, text=16),
    Case("hidden 1024, 2 + 4 blocks", MIDDLE, batch=1, rows=32, text=512),
)


@dataclass(frozen=True)
class Result:
    """Milliseconds per forward pass; ratios are ours / PyTorch's, below 1 where ours is faster."""

    name: str
    relative_error: float
    ours_wall: float
    torch_wall: float
    wall_ratio: float
    best_wall_ratio: float
    ours_cpu: float
    torch_cpu: float
    cpu_ratio: float


def random_model(config: FluxConfig) -> FluxTransformer:
    """Our model with every parameter random, including those that are initialised to zero."""
    model = FluxTransformer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def disturbed(x: jax.Array) -> jax.Array:
        return x + 0.02 * rng.standard_normal(x.shape, np.float32)

    nnx.update(model, jax.tree.map(disturbed, nnx.state(model, nnx.Param)))
    return model


def original(model: FluxTransformer) -> FluxTransformer2DModel:
    """diffusers' model with the same weights."""
    settings = flux_diffusers.settings_of(model.config)
    theirs = FluxTransformer2DModel(**{k: v for k, v in settings.items() if k[0] != "_"})
    params = {path: np.asarray(param.get_value()) for path, param in flat_params(model).items()}
    tensors = exported(flux_diffusers.TABLE, ArrayTensors("the model", params))
    theirs.load_state_dict(
        {
            key: torch.tensor(np.concatenate([*tensor.pieces()]).reshape(tensor.shape))
            for key, tensor in tensors.items()
        }
    )
    return theirs.eval()


def position_ids(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' (index, row, column) of each text and each image token."""
    grid = torch.zeros(case.rows, case.rows, 3)
    grid[..., 1] = torch.arange(case.rows)[:, None]
    grid[..., 2] = torch.arange(case.rows)[None, :]
    return torch.zeros(case.text, 3), grid.reshape(-1, 3)


def prepare(case: Case) -> tuple[Callable[[], None], Callable[[], None], float]:
    """Our forward pass, PyTorch's, and the relative error between their outputs."""
    config, rng = case.config, np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal((case.batch, *shape), dtype=np.float32)

    side = case.rows * config.patch_size
    latents = noise(side, side, config.latent_channels)
    txt, pooled = noise(case.text, config.txt_dim), noise(config.pooled_dim)
    timestep = np.linspace(1000, 500, case.batch, dtype=np.float32)
    guidance = np.full(case.batch, 3.5, np.float32) if config.guidance_embed else None

    model = random_model(config)
    graph, state = nnx.split(model)
    reference = original(model)
    txt_ids, img_ids = position_ids(case)
    tensors = {
        "hidden_states": torch.tensor(np.array(patchify(jnp.asarray(latents), config.patch_size))),
        "encoder_hidden_states": torch.tensor(txt),
        "pooled_projections": torch.tensor(pooled),
        "timestep": torch.tensor(timestep) / 1000,
        "guidance": None if guidance is None else torch.tensor(guidance),
        "txt_ids": txt_ids,
        "img_ids": img_ids,
    }

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            return reference(**tensors, return_dict=False)[0]

    arrays = jax.device_put((latents, timestep, txt, pooled, guidance))

    @jax.jit
    def forward(state, latents, timestep, txt, pooled, guidance):
        model = nnx.merge(graph, state)
        return model(latents, timestep, txt, pooled, guidance=guidance)

    def ours() -> jax.Array:
        return jax.block_until_ready(forward(state, *arrays))

    a = np.asarray(patchify(ours(), config.patch_size))
    b = theirs().numpy()
    return ours, theirs, float(np.linalg.norm(a - b) / np.linalg.norm(b))


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Wall and CPU milliseconds of one call, the mean of `repeats`."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return (
        (time.perf_counter() - wall) * 1000 / repeats,
        (time.process_time() - cpu) * 1000 / repeats,
    )


def measure(case: Case, rounds: int, seconds_per_round: float) -> Result:
    """Times one case in alternating rounds. Raises RuntimeError when the outputs differ."""
    ours, theirs, error = prepare(case)
    if not error <= MAX_RELATIVE_ERROR:
        raise RuntimeError(f"{case.name}: outputs differ by {error:.1e} relative; nothing is timed")
    repeats = [max(1, round(seconds_per_round * 1000 / timed(f, 1)[0])) for f in (ours, theirs)]
    samples = [(*timed(ours, repeats[0]), *timed(theirs, repeats[1])) for _ in range(rounds)]
    wall, cpu, torch_wall, torch_cpu = (statistics.median(x) for x in zip(*samples, strict=True))
    return Result(
        name=case.name,
        relative_error=error,
        ours_wall=wall,
        torch_wall=torch_wall,
        wall_ratio=wall / torch_wall,
        best_wall_ratio=min(s[0] for s in samples) / min(s[2] for s in samples),
        ours_cpu=cpu,
        torch_cpu=torch_cpu,
        cpu_ratio=cpu / torch_cpu,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds per case")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each model in each round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each library")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    os.environ["NPROC"] = str(args.threads)  # XLA reads it when its CPU client starts
    torch.set_num_threads(args.threads)

    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("ms per forward pass, medians; ratio = ours / PyTorch, below 1 where ours is faster\n")
    print(f"{'':27}{'wall ours':>10}{'torch':>9}{'ratio':>7}{'best':>7}", end="")
    print(f"{'CPU ours':>11}{'torch':>9}{'ratio':>7}{'error':>10}")
    results = []
    for case in CASES:
        r = measure(case, args.rounds, args.seconds)
        results.append(r)
        print(f"{r.name:27}{r.ours_wall:10.2f}{r.torch_wall:9.2f}{r.wall_ratio:7.2f}", end="")
        print(f"{r.best_wall_ratio:7.2f}{r.ours_cpu:11.2f}{r.torch_cpu:9.2f}", end="")
        print(f"{r.cpu_ratio:7.2f}{r.relative_error:10.1e}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
