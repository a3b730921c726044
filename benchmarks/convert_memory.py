"""Converting a large sharded checkpoint: peak memory, and time beside a plain copy of its bytes.

    python -m benchmarks.convert_memory [--gigabytes N] [--folder DIR] [--rounds N] [--json FILE]

The source is a synthetic FLUX of FLUX.1-dev's width in diffusers' layout, bfloat16, in shards of
1 GB, with as many blocks as the size requires. Each round copies it (through one buffer, with an
fsync at the end, as conversion does) and converts it with `python -m convert flux`. The order
alternates from round to round, and before each the system writes back its dirty pages and drops the
source from its cache. At the end `python -m convert verify` checks the result. Each command runs in
its own process: its peak is the kernel's figure of resident memory, its time includes starting
Python and JAX, which is also shown separately. Times are medians over the rounds. Twice the size
must be free in the folder.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import ml_dtypes
import numpy as np

from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.flux.model import FLUX_DEV, FluxConfig
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.nn.kinds import shapes_of

SHARD_BYTES = 10**9
SINGLE_PER_DOUBLE = 2
"""As in FLUX.1-dev: 19 and 38 blocks."""

PROGRAM = """
import sys
from taca_jax.convert.cli import main
main(sys.argv[1:])
fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print("peak", int(fields["VmHWM"].split()[0]) * 1024)
"""


@dataclass(frozen=True)
class Result:
    """Seconds and bytes; `_cpu` is processor time, `ratio` that of the medians, convert / copy."""

    size: int
    tensors: int
    copy_seconds: list[float]
    convert_seconds: list[float]
    verify_seconds: float
    start_seconds: float
    convert_peak: int
    verify_peak: int
    ratio: float
    copy_cpu: list[float]
    convert_cpu: list[float]


def config_of(gigabytes: float) -> FluxConfig:
    """FLUX.1-dev with enough blocks for the size, at least one of each kind."""

    def size(blocks: int) -> int:
        config = dataclasses.replace(
            FLUX_DEV, num_double_blocks=blocks, num_single_blocks=SINGLE_PER_DOUBLE * blocks
        )
        return 2 * sum(int(np.prod(shape)) for shape in shapes_of(config).values())

    blocks = 1
    while size(blocks) < gigabytes * 1e9:
        blocks += 1
    return dataclasses.replace(
        FLUX_DEV, num_double_blocks=blocks, num_single_blocks=SINGLE_PER_DOUBLE * blocks
    )


def write_checkpoint(folder: Path, config: FluxConfig) -> tuple[int, int]:
    """Writes a sharded checkpoint of random numbers; returns its bytes and number of tensors."""
    folder.mkdir()
    settings = flux_diffusers.settings_of(config)
    (folder / "config.json").write_text(json.dumps(settings))
    noise = np.random.default_rng(0).normal(size=2**22).astype(ml_dtypes.bfloat16)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    size = count = 0

    def finish() -> None:
        name = f"diffusion_pytorch_model-{len(set(weight_map.values())) + 1:05}.safetensors"
        write_tensors(folder / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for piece in flux_diffusers.TABLE.pieces(shapes_of(config)):
        shard[piece.key] = np.resize(np.roll(noise, count), piece.shape)
        size, count = size + shard[piece.key].nbytes, count + 1
        if sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
            finish()
    if shard:
        finish()
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return size, count


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def forget(folder: Path) -> None:
    """Writes back dirty pages, and drops the folder's files from the system's cache."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(src: Path, dst: Path) -> float:
    """Seconds to copy a folder, including writing to the disk."""
    start = time.perf_counter()
    dst.mkdir()
    buffer = memoryview(bytearray(2**24))
    for file in src.iterdir():
        # Not with shutil.copyfile, which may share blocks between the files instead.
        with file.open("rb", buffering=0) as read, (dst / file.name).open("wb", 0) as written:
            while size := read.readinto(buffer):
                written.write(buffer[:size])
            os.fsync(written.fileno())
    return time.perf_counter() - start


def command(*words: str) -> tuple[float, int, str]:
    """Seconds and peak resident bytes of `python -m convert ...`, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    *said, peak = done.stdout.splitlines()
    return time.perf_counter() - start, int(peak.split()[1]), "\n".join(said)


def start_seconds() -> float:
    """Seconds to start Python and import the command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import taca_jax.convert.cli"], check=True)
    return time.perf_counter() - start


def measure(folder: Path, gigabytes: float, rounds: int) -> Result:
    src, dst, copy = folder / "src", folder / "dst", folder / "copy"
    size, count = write_checkpoint(src, config_of(gigabytes))
    print(f"{size / 1e9:.2f} GB in {count} tensors, {len(list(src.glob('*.safetensors')))} shards")
    seconds: dict[str, list[float]] = {"copy": [], "convert": []}
    cpu: dict[str, list[float]] = {"copy": [], "convert": []}
    peaks = []
    for number in range(rounds):
        for name in ("copy", "convert") if number % 2 == 0 else ("convert", "copy"):
            for made in (dst, copy):
                shutil.rmtree(made, ignore_errors=True)
            forget(src)
            before = cpu_seconds()
            if name == "copy":
                seconds[name].append(copied(src, copy))
            else:
                took, peak, _ = command("flux", "--src", str(src), "--dst", str(dst))
                seconds[name].append(took)
                peaks.append(peak)
            cpu[name].append(cpu_seconds() - before)
        print(f"round {number + 1}: {seconds['copy'][-1]:.1f} s, {seconds['convert'][-1]:.1f} s")
    if not dst.exists():
        command("flux", "--src", str(src), "--dst", str(dst))
    forget(src)
    verify_seconds, verify_peak, said = command("verify", "--src", str(src), "--dst", str(dst))
    print(said.replace(str(dst), "verified"))
    return Result(
        size=size,
        tensors=count,
        copy_seconds=seconds["copy"],
        convert_seconds=seconds["convert"],
        verify_seconds=verify_seconds,
        start_seconds=start_seconds(),
        convert_peak=max(peaks),
        verify_peak=verify_peak,
        ratio=median(seconds["convert"]) / median(seconds["copy"]),
        copy_cpu=cpu["copy"],
        convert_cpu=cpu["convert"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options.gigabytes, options.rounds)
    print(f"{'':10}{'seconds':>10}{'processor':>11}{'peak memory':>14}")
    for name, seconds, cpu, peak in (
        ("copy", result.copy_seconds, result.copy_cpu, None),
        ("convert", result.convert_seconds, result.convert_cpu, result.convert_peak),
        ("verify", [result.verify_seconds], None, result.verify_peak),
    ):
        processor = f"{median(cpu):>11.1f}" if cpu else f"{'':11}"
        memory = f"{peak / 1e6:>11,.0f} MB" if peak else ""
        print(f"{name:10}{median(seconds):>10.1f}{processor}{memory}")
    print(
        f"convert / copy: {result.ratio:.2f}; starting Python and JAX: {result.start_seconds:.1f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
