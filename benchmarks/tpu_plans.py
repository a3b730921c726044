"""What training and sampling need on slices of TPUs, by the TPU compiler; no TPU is necessary.

    python -m benchmarks.tpu_plans [--rows NAME ...] [--json FILE] [--programs FOLDER]

Every row compiles the real program for its slice (some minutes each). Memory is the compiler's
figure for one chip; FLOPs are the transformer's, on all chips; the least time is the roofline's,
with the resource that limits it: matrix units, memory or wires; the estimated time is the sum of
the compiler's estimates of the program's operations, and the share of the peak (MFU) is at that;
hidden is the share of the wires' time that the schedule overlaps with work; compiling is CPU time,
of all cores together. --programs writes the compiled programs' text.
"""

import argparse
import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp

from configs import flux2_taca, flux_taca, sd35_taca
from taca_jax.nn.low_bit import Quantization
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.pipelines.opening import Opening
from taca_jax.planning import plan as plans
from taca_jax.planning.drawing import DRAWING, Drawing, drawing_plans
from taca_jax.planning.plan import GB, OutOfMemoryError, Plan
from taca_jax.planning.slices import Slice
from taca_jax.text.encoders import FOLDERS as TEXT_ENCODERS
from taca_jax.training.config import TrainConfig
from taca_jax.training.models import open_models
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import published_pipeline

RESOLUTION = 1024


@dataclass(frozen=True)
class Row:
    """A row of the table: its name, which ends with that of its slice, and what makes its plan."""

    name: str
    words: str
    make: Callable[[Slice], Plan]

    @property
    def where(self) -> str:
        return "-".join(self.name.split("-")[-2:])


def training(
    config: TrainConfig,
    where: Slice,
    *,
    rank: int = 64,
    images: int = 1,
    quantize: Quantization = "none",
    quantize_text: Quantization = "none",
    encode: Literal["online", "cache"] = "online",
) -> Plan:
    """A training step of a LoRA of `rank`, with `images` per chip; encode as in DataConfig."""
    assert config.lora is not None
    config = replace(
        config,
        lora=replace(config.lora, rank=rank, alpha=rank),
        data=replace(
            config.data, batch_size=images * where.chips, resolution=RESOLUTION, encode=encode
        ),
        quantize=quantize,
        quantize_text=quantize_text,
    )
    return plans.make_plan(open_models(config, published=True), where)


def sampling(where: Slice, quantize: Quantization) -> Plan:
    """FLUX.1-dev draws one picture with TACA, from given embeddings: FLOPs and times of a denoising
    step, and the memory of the loop or of decoding, whichever needs more."""
    stored = published_pipeline("flux1-dev")
    models = {name: each for name, each in stored.models.items() if name not in TEXT_ENCODERS}
    dtype = jnp.dtype("bfloat16")
    opening = Opening(replace(stored, models=models), LoadOptions(dtype, dtype, quantize=quantize))
    place = opening.place(MeshConfig(), plans.devices_of(where), stages=False)
    picture = Drawing(1, RESOLUTION, RESOLUTION, stored.settings.guidance)
    found = drawing_plans(opening, place, where, picture)
    return replace(
        found[DRAWING],
        program=max(plan.program for plan in found.values()),
        compile_seconds=sum(plan.compile_seconds for plan in found.values()),
    )


FLUX_RUN, SD35_RUN = flux_taca.CONFIG, sd35_taca.CONFIG
_CACHED = partial(training, FLUX_RUN, encode="cache")
ROWS: tuple[Row, ...] = (
    Row(
        "sd35-v5e-1",
        "SD3.5-Medium LoRA r=64, bf16, 1 image/chip, encoded before",
        partial(training, SD35_RUN, encode="cache"),
    ),
    Row(
        "sd35-online-v5e-1",
        "SD3.5-Medium LoRA r=64, bf16, 1 image/chip, T5 in int8",
        partial(training, SD35_RUN, quantize_text="int8"),
    ),
    Row(
        "klein-online-v5e-1",
        "FLUX.2 [klein] base 4B LoRA r=32, bf16, 1 image/chip",
        partial(training, flux2_taca.CONFIG, rank=32),
    ),
    Row(
        "klein-9b-v5e-4",
        "FLUX.2 [klein] base 9B LoRA r=32, bf16, 1 image/chip",
        partial(training, replace(flux2_taca.CONFIG, base="flux2-klein-base-9b"), rank=32),
    ),
    Row("sample-v5e-1", "FLUX.1-dev sampling, int8, T5 apart", partial(sampling, quantize="int8")),
    Row(
        "r16-v5e-1",
        "FLUX.1-dev LoRA r=16, nf4, 1 image/chip, encoded before",
        partial(_CACHED, rank=16, quantize="nf4"),
    ),
    Row(
        "r16-online-v5e-1",
        "FLUX.1-dev LoRA r=16, nf4, 1 image/chip, T5 in int8",
        partial(training, FLUX_RUN, rank=16, quantize="nf4", quantize_text="int8"),
    ),
    Row("r64-v5e-8", "FLUX.1-dev LoRA r=64, bf16, 1 image/chip", partial(training, FLUX_RUN)),
    *(
        Row(
            f"r64x4-{where}",
            "FLUX.1-dev LoRA r=64, bf16, 4 images/chip, encoded before",
            partial(_CACHED, images=4),
        )
        for where in ("v5e-16", "v6e-16", "v5p-8")
    ),
    *(
        Row(f"r64-{where}", "FLUX.1-dev LoRA r=64, bf16, 1 image/chip, encoded before", _CACHED)
        for where in ("v5e-256", "v5p-512")
    ),
)
"""Unless a row says otherwise, text encoders and autoencoder run in the step."""
HEADER = (
    "| program at 1024 px | slice | chip memory | fits | FLOPs of a step | least time, set by "
    "| estimated time, of the peak | wires: received, hidden | CPU time to compile |"
)


def described(row: Row, plan: Plan) -> str:
    """A row as Markdown."""
    memory, whole = plan.memory / GB, plan.where.chip.memory / GB
    wires = plan.traffic.together.received
    return " | ".join(
        (
            f"| {row.words}",
            plan.where.name,
            f"{memory:.1f} of {whole:.1f} GB",
            "yes" if plan.fits else "no",
            f"{plan.flops / 1e12:,.0f} T",
            f"{plan.seconds[plan.bound]:.2f} s, {plan.bound}",
            f"{plan.estimated:.2f} s, {plan.utilisation:.0%}",
            f"{wires / GB:.1f} GB, {plan.hidden:.0%}" if wires else "none",
            f"{plan.compile_seconds:.0f} s |",
        )
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The figures of a plan."""
    return {
        "slice": plan.where.name,
        "mesh": dict(plan.mesh.shape),
        "batch": plan.batch,
        "parts": dict(plan.parts),
        "program": plan.program,
        "memory": plan.memory,
        "fits": plan.fits,
        "flops": plan.flops,
        "further": plan.further,
        "remat": plan.remat,
        "estimated": plan.estimated,
        "utilisation": plan.utilisation,
        "seconds": plan.seconds,
        "bound": plan.bound,
        "hidden": plan.hidden,
        "traffic": asdict(plan.traffic),
        "compile_seconds": plan.compile_seconds,
    }


def main(argv: Sequence[str] | None = None) -> None:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW")
    parser.add_argument("--json", type=Path, help="adds the rows that were compiled to this file")
    parser.add_argument("--programs", type=Path, help="a folder for the compiled programs' text")
    arguments = parser.parse_args(argv)
    print(HEADER)
    print("|---" * (HEADER.count("|") - 1) + "|", flush=True)
    for row in ROWS:
        if row.name not in arguments.rows:
            continue
        where = Slice.of(row.where)
        try:
            plan = row.make(where)
        except OutOfMemoryError as error:
            print(f"| {row.words} | {row.where} | {error} | no | | | | | |", flush=True)
            continue
        print(described(row, plan), flush=True)
        if arguments.json is not None:
            file = arguments.json
            before = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(json.dumps(before | {row.name: as_json(plan)}, indent=1) + "\n")
        if arguments.programs is not None:
            arguments.programs.mkdir(parents=True, exist_ok=True)
            with gzip.open(arguments.programs / f"{row.name}.hlo.gz", "wt") as program:
                program.write(plan.text)


if __name__ == "__main__":
    main()
