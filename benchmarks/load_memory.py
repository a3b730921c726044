"""Loads a large pipeline, original and converted: peak memory beyond the model itself, and time.

    python -m benchmarks.load_memory [--gigabytes N] [--folder DIR] [--json FILE]

A synthetic FLUX of FLUX.1-dev's width in bfloat16, as `benchmarks.convert_memory` makes it, is
loaded with `FluxPipeline.from_pretrained` from diffusers' layout and from its conversion, each in
its own process. Printed is the peak of resident memory minus what was resident before; on the CPU,
where the model is in the same memory, also minus the parameters' bytes. Three times the size must
be free in the folder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.convert_memory import command, config_of, write_checkpoint
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.flux.model import FluxConfig
from taca_jax.nn.kinds import shapes_of

PROGRAM = """
import sys, time
import jax
from taca_jax import FluxPipeline
from taca_jax.nn.kinds import flat_params

def memory(name):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields[name].split()[0]) * 1024

jax.block_until_ready(jax.numpy.zeros(1))
before, start = memory("VmRSS"), time.perf_counter()
pipeline = FluxPipeline.from_pretrained(sys.argv[1])
jax.block_until_ready([param.get_value() for param in flat_params(pipeline.transformer).values()])
seconds = time.perf_counter() - start
model = sum(param.get_value().nbytes for param in flat_params(pipeline.transformer).values())
here = model if jax.default_backend() == "cpu" else 0
print(memory("VmHWM") - before - here, seconds)
"""


@dataclass(frozen=True)
class Loaded:
    """Bytes of peak memory beyond the model, and seconds."""

    excess: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """size, largest_tensor (of the original), largest_stack (of our stacked layers): in bytes."""

    size: int
    largest_tensor: int
    largest_stack: int
    original: Loaded
    converted: Loaded


def loaded(path: Path) -> Loaded:
    """Loads the pipeline at `path` in its own process, and measures it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    excess, seconds = done.stdout.splitlines()[-1].split()
    return Loaded(int(excess), float(seconds))


def measure(folder: Path, config: FluxConfig) -> Result:
    """Writes a pipeline of this config with random weights into the folder, and loads it."""
    src, dst = folder / "src", folder / "dst"
    src.mkdir()
    size, _ = write_checkpoint(src / "transformer", config)
    shapes = shapes_of(config)
    original = loaded(src)
    command("flux", "--src", str(src), "--dst", str(dst))
    return Result(
        size=size,
        largest_tensor=2 * max(int(np.prod(p.shape)) for p in flux_diffusers.TABLE.pieces(shapes)),
        largest_stack=2 * max(int(np.prod(shape)) for shape in shapes.values()),
        original=original,
        converted=loaded(dst),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), config_of(options.gigabytes))
    print(
        f"{result.size / 1e9:.2f} GB; the largest tensor is {result.largest_tensor / 1e6:,.0f} MB, "
        f"the largest stack of layers {result.largest_stack / 1e6:,.0f} MB"
    )
    for name, took in (("original", result.original), ("converted", result.converted)):
        print(
            f"{name:10}{took.excess / 1e6:>9,.0f} MB beyond the model at its peak, "
            f"{took.seconds:.1f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
