"""Compares many settings of TACA on shapes, each with the plain base: a table and a figure.

What is drawn is kept, so that an interrupted sweep goes on where it was, and a setting that is
added later costs only its own pictures.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from taca_jax.config.json_text import to_tree
from taca_jax.evaluation.digests import digest_of_loras
from taca_jax.evaluation.plots import need_matplotlib
from taca_jax.evaluation.record import check_record, write_record
from taca_jax.evaluation.shapes.alignment import Alignment, measure
from taca_jax.evaluation.shapes.base import check_base
from taca_jax.evaluation.shapes.halves import Half, make_halves
from taca_jax.evaluation.shapes.report import difference_text, share_text, summary
from taca_jax.evaluation.shapes.sampler import PICTURES, Sampler
from taca_jax.evaluation.shapes.sweep_config import SweepConfig
from taca_jax.evaluation.sweeps import AXES, EACH_ALONE, Setting, loras_of, settings
from taca_jax.formats.atomic import whole_file
from taca_jax.pipelines.checks import check_evaluation
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.generate import load_pipeline, local_mesh
from taca_jax.pipelines.lora_choice import parse_loras

FREE_FIELDS = (*AXES, "vary", "lora")
"""Fields that may change while a sweep's folder goes on; what is kept is told apart by the content
of its LoRA, the center's too."""


def sweep(config: SweepConfig) -> None:
    """Draws and measures all settings, prints the table, and writes `config.out`/sweep.json and
    sweep.png.

    Raises UserError for problems that the user can fix.
    """
    need_matplotlib()
    from taca_jax.evaluation.shapes.sweep_figure import draw_figure

    out, files = Path(config.out), {"base": config.base}
    check_base(config)
    loras = loras_of(settings(config, 1.0))  # the same ones whatever the model's guidance is
    stored = check_evaluation(replace(config, lora=None), loras=loras)
    points = settings(config, stored.settings.guidance)
    check_record(out, config, files, free=FREE_FIELDS)
    pipeline = load_pipeline(replace(config, lora=None), local_mesh(config))
    for lora in loras:
        pipeline.unload_lora()
        pipeline.load_lora(lora)  # one that does not fit is refused before anything is drawn
    write_record(out, config, files)
    sampler = Sampler(
        pipeline,
        config.batch_size,
        config.steps,
        config.height,
        config.width,
        config.seed,
        out / PICTURES,
    )
    halves = make_halves(config.prompts)
    print(f"{len(points)} settings, {sum(len(half.prompts) for half in halves)} pictures each")
    rows = []
    for guidance in dict.fromkeys(point.guidance for point in points):
        group = [point for point in points if point.guidance == guidance]
        rows += _rows(group, _measure(sampler, group, halves), pipeline.settings.guidance)
    with whole_file(out / "sweep.json") as file:
        file.write_text(json.dumps(rows, indent=1) + "\n")
    for each in tables(rows):
        Console().print(each)
    draw_figure(rows, out / "sweep.png")
    print(f"wrote {out / 'sweep.json'} and {out / 'sweep.png'}")


def _measure(sampler: Sampler, group: Sequence[Setting], halves: Sequence[Half]) -> list[Alignment]:
    """What each setting of one guidance drew of each half, one LoRA after the other."""
    correct: list[dict[str, np.ndarray]] = [{} for _ in halves]
    exact: list[dict[str, np.ndarray]] = [{} for _ in halves]
    for lora in dict.fromkeys(point.lora for point in group):
        sampler.pipeline.unload_lora()
        drawing = sampler
        if lora is not None:
            sampler.pipeline.load_lora(lora)
            drawing = replace(sampler, lora=digest_of_loras(parse_loras(lora)))
        for point in group:
            if point.lora != lora:
                continue
            strength = 0.0 if lora is None else 1.0
            variant = Variant(point.name, point.taca, strength, point.guidance)
            for i, half in enumerate(measure(drawing, [variant], halves)[0]):
                correct[i][point.name] = half.correct[point.name]
                exact[i][point.name] = half.exact[point.name]
    # In the settings' order, the plain base first: differences are from it.
    order = [point.name for point in group]
    return [
        Alignment(half, {n: right[n] for n in order}, {n: alone[n] for n in order})
        for half, right, alone in zip(halves, correct, exact, strict=True)
    ]


def _rows(
    group: Sequence[Setting], alignments: Sequence[Alignment], own_guidance: float
) -> list[dict[str, Any]]:
    """For JSON: each setting with the summary of each half."""
    guidance = own_guidance if group[0].guidance is None else group[0].guidance
    at = {point.name: guidance for point in group}
    halves = {each.half.name: summary(each, at) for each in alignments}
    return [
        {
            "name": point.name,
            "taca": None if point.taca is None else to_tree(point.taca),
            "lora": point.lora,
            "guidance": guidance,
            **{half: rows[point.name] for half, rows in halves.items()},
        }
        for point in group
    ]


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The settings as a table of each half: % right with 95 % intervals, the paired difference from
    the plain base in points, and % right with nothing else drawn."""
    halves = [
        name for name, value in rows[0].items() if isinstance(value, dict) and "correct" in value
    ]
    return [_table(half, rows) for half in halves]


def _table(half: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    out = Table(
        title=f"{half.capitalize()} compositions drawn right, %, and points from the base (95 %)",
        caption=EACH_ALONE,
    )
    out.add_column("setting", overflow="fold")
    for heading in ("right", "against base", "exact"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        share, exact = (row[half][measure]["all"] for measure in ("correct", "exact"))
        difference = row[half].get("difference")
        said = "" if difference is None else difference_text(difference["correct"])
        out.add_row(row["name"], share_text(share), said, f"{100 * exact['value']:.1f}")
    return out
