"""Loading a large pipeline, and saving it: peak memory beyond the model itself, and time.

    python -m benchmarks.load_memory [--gigabytes N] [--devices N] [--folder DIR] [--json FILE]

A synthetic FLUX of FLUX.1-dev's width in bfloat16, as `benchmarks.convert_memory` makes it, loaded
with `FluxPipeline.from_pretrained` from diffusers' layout and from its conversion, onto one device
or onto a mesh of so many virtual ones; from there its transformer is saved again. Each load is a
process of its own. Where the device is the CPU the model lies in the same memory, so what is
printed of a load is the peak of resident memory less what was resident before and the parameters'
bytes; on an accelerator it is less what was resident before alone, as it is of saving. Four times
the size must be free in the folder.
"""

import argparse
import json
import os
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
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.weights.folders import save_model

def memory(name):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields[name].split()[0]) * 1024

def measured(run, made=lambda: 0):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before, start = memory("VmRSS"), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(memory("VmHWM") - before - made(), seconds)

def load():
    global arrays, pipeline
    pipeline = FluxPipeline.from_pretrained(sys.argv[1], mesh=mesh)
    arrays = [param.get_value() for param in flat_params(pipeline.transformer).values()]
    jax.block_until_ready(arrays)

def here():
    return sum(array.nbytes for array in arrays) if jax.default_backend() == "cpu" else 0

mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
jax.block_until_ready(jax.numpy.zeros(1))
measured(load, here)
measured(lambda: save_model(sys.argv[2], pipeline.transformer))
"""


@dataclass(frozen=True)
class Took:
    """Bytes of peak memory beyond the model, and seconds."""

    excess: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """Bytes: of the model, of the largest tensor of the original, of the largest stack of ours."""

    size: int
    largest_tensor: int
    largest_stack: int
    devices: int
    original: Took
    converted: Took
    saved: Took


def loaded(path: Path, devices: int) -> tuple[Took, Took]:
    """What loading the pipeline at `path` takes, and saving its transformer, in one process."""
    environment = dict(os.environ)
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path), f"{made}/saved"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    load, save = (line.split() for line in done.stdout.splitlines()[-2:])
    return Took(int(load[0]), float(load[1])), Took(int(save[0]), float(save[1]))


def measure(folder: Path, config: FluxConfig, devices: int) -> Result:
    """Writes a pipeline of this config with random weights into the folder, and loads it."""
    src, dst = folder / "src", folder / "dst"
    src.mkdir()
    size, _ = write_checkpoint(src / "transformer", config)
    shapes = shapes_of(config)
    original, _ = loaded(src, devices)
    command("flux", "--src", str(src), "--dst", str(dst))
    converted, saved = loaded(dst, devices)
    return Result(
        size=size,
        largest_tensor=2 * max(int(np.prod(p.shape)) for p in flux_diffusers.TABLE.pieces(shapes)),
        largest_stack=2 * max(int(np.prod(shape)) for shape in shapes.values()),
        devices=devices,
        original=original,
        converted=converted,
        saved=saved,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--devices", type=int, default=1, help="virtual ones, on the CPU")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), config_of(options.gigabytes), options.devices)
    print(
        f"{result.size / 1e9:.2f} GB on {result.devices} devices; the largest tensor is "
        f"{result.largest_tensor / 1e6:,.0f} MB, the largest stack of layers "
        f"{result.largest_stack / 1e6:,.0f} MB"
    )
    for name in ("original", "converted", "saved"):
        took = getattr(result, name)
        print(
            f"{name:10}{took.excess / 1e6:>9,.0f} MB beyond the model at its peak, "
            f"{took.seconds:.1f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
