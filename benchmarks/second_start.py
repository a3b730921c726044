"""The second start of a command against its first: what keeping compiled programs saves.

    python -m benchmarks.second_start [--only WORDS] [--json FILE]

Draws a picture and trains two steps, each by its command and each twice from an empty folder of
compiled programs: with the small model that comes with the package, and with a random FLUX of 4 + 8
blocks of width 512. Seconds are from the start of the process to its end; CPU seconds, of all
cores, depend less on what else the machine does.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from flax import nnx
from rich.console import Console
from rich.table import Table

from taca_jax import FluxPipeline
from taca_jax.nn.kinds import kind_of

ROOT = Path(__file__).resolve().parents[1]
MEDIUM = {
    "num_heads": 8,
    "head_dim": 64,
    "axes_dim": (16, 24, 24),
    "num_double_blocks": 4,
    "num_single_blocks": 8,
}


@dataclass(frozen=True)
class Start:
    """Seconds that a process took."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Result:
    """A command's first start, with nothing compiled yet, and its second."""

    name: str
    first: Start
    second: Start


def write_medium(folder: Path) -> Path:
    """A pipeline with a larger transformer of random weights."""
    small = FluxPipeline.from_pretrained("shapes_base", dtype="float32")
    config = replace(small.config, **MEDIUM)
    FluxPipeline(
        kind_of(config).module(config, rngs=nnx.Rngs(0)),
        text_encoder=small.text_encoder,
        tokenizer=small.tokenizer,
        autoencoder=small.autoencoder,
        settings=small.settings,
    ).save(folder)
    return folder


def start(arguments: list[str], kept: Path) -> Start:
    """Runs a command once, with compiled programs in the folder `kept`."""
    environment = os.environ | {"XDG_CACHE_HOME": str(kept), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    before, then = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
    wall, after = time.perf_counter() - then, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Start(wall, cpu)


def measure(work: Path, only: str) -> list[Result]:
    """Every command with `only` in its name, in a folder for what they write."""
    bases = {"shapes": [], "width 512": [f"base={write_medium(work / 'medium')}"]}
    found = []
    for model, base in bases.items():
        draw = ["prompt=a red circle", f"out={work / 'out.png'}"]
        train = ["steps=2", "evaluate=none"]
        lora = ["lora=none"] if base else []
        commands = {
            "draws a picture": lambda _, base=base, lora=lora, draw=draw: [
                *(str(ROOT / "generate.py"), "--config", "shapes_taca", *base, *lora, *draw)
            ],
            "trains two steps": lambda run, base=base, train=train: [
                *(str(ROOT / "train.py"), "--config", "shapes_taca", *base, *train),
                f"out_dir={run}",
            ],
        }
        for name, command in commands.items():
            if only not in f"{model}: {name}":
                continue
            kept = work / f"kept, {model}, {name}"
            starts = [start(command(work / f"{kept.name} {i}"), kept) for i in range(2)]
            found.append(Result(f"{model}: {name}", *starts))
    return found


def table(results: list[Result]) -> Table:
    columns = ("first start", "second start", "ratio", "CPU s, first", "second", "ratio")
    made = Table("", *columns)
    for each in results:
        first, second = each.first, each.second
        made.add_row(
            each.name,
            f"{first.wall:.1f} s",
            f"{second.wall:.1f} s",
            f"{second.wall / first.wall:.2f}",
            f"{first.cpu:.1f}",
            f"{second.cpu:.1f}",
            f"{second.cpu / first.cpu:.2f}",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also writes the results there")
    parser.add_argument("--only", default="", help="words in the names of what is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = measure(Path(work), arguments.only)
    Console().print(table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(each) for each in results]))


if __name__ == "__main__":
    main()
