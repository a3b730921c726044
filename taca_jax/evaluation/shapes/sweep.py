"""Compares many settings of TACA on shapes, each with the plain base: a table and a figure.

What is drawn is kept, so that an interrupted sweep goes on where it was, and a setting that is
added later costs only its own pictures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from taca_jax.config.json_text import from_json, to_tree
from taca_jax.errors import UserError
from taca_jax.evaluation.digests import digest_of_loras
from taca_jax.evaluation.plots import need_matplotlib
from taca_jax.evaluation.record import check_record, write_record
from taca_jax.evaluation.shapes.alignment import Alignment, measure
from taca_jax.evaluation.shapes.base import check_base
from taca_jax.evaluation.shapes.halves import Half, make_halves
from taca_jax.evaluation.shapes.report import EACH_ALONE, difference_text, share_text, summary
from taca_jax.evaluation.shapes.sampler import PICTURES, Sampler
from taca_jax.evaluation.shapes.sweep_config import SweepConfig
from taca_jax.formats.atomic import whole_file
from taca_jax.pipelines.checks import check_evaluation
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.generate import load_pipeline, local_mesh
from taca_jax.pipelines.lora_choice import parse_loras
from taca_jax.taca import TacaConfig

AXES = ("gammas", "thresholds", "schedules", "cond_only", "loras", "gammas_learned", "guidances")
"""The fields of SweepConfig that hold the values of an axis."""

FREE_FIELDS = (*AXES, "vary", "lora")
"""Fields that may change while a sweep's folder goes on; what is kept is told apart by the content
of its LoRA, the center's too."""


@dataclass(frozen=True)
class Setting:
    """One point of a sweep. taca: None for the plain base, which has no LoRA either."""

    taca: TacaConfig | None
    lora: str | None
    guidance: float | None

    @property
    def name(self) -> str:
        """All that distinguishes it from others, in words."""
        taca = self.taca
        if taca is None:
            words = ["base"]
        elif taca.knots is not None:
            words = [f"gamma {' '.join(map(_said, taca.knots))}"]
        elif taca.gamma == 1 or taca.first_steps is not None:
            words = [f"gamma {_said(taca.gamma)}"]
        else:
            words = [f"gamma {_said(taca.gamma)}", taca.schedule]
        if taca is not None:
            first = taca.first_steps
            acts = f"t >= {_said(taca.threshold)}" if first is None else f"first {first} steps"
            words += [acts, *(["conditional half"] if taca.cond_only else [])]
            words.append("no LoRA" if self.lora is None else f"LoRA {self.lora}")
        words += [] if self.guidance is None else [f"guidance {_said(self.guidance)}"]
        return ", ".join(words)


def _said(number: float) -> str:
    """The number in the fewest digits that distinguish it from all others."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def settings(config: SweepConfig, own_guidance: float) -> list[Setting]:
    """The points of a sweep, those of a guidance together, the plain base first in each; their
    names are distinct.

    Settings that are the same attention are drawn once: gamma 1 has no schedule, with no LoRA it is
    the base, and at guidance of at most 1 there is no unconditional half. own_guidance: the
    model's, where none is configured. Raises UserError for a file of gammas_learned that cannot be
    read.
    """
    taca = config.taca
    assert taca is not None  # SweepConfig refuses none
    center = Setting(taca, config.lora, config.guidance)
    axes = _axes(config)
    if config.vary == "each":
        points = [center, *(change(center) for axis in axes for change in axis)]
    else:
        combined = product(*(axis or [lambda point: point] for axis in axes))
        points = [reduce(lambda point, change: change(point), each, center) for each in combined]
    points += [
        replace(center, taca=_learned(Path(file)), lora=lora)
        for file in config.gammas_learned
        for lora in dict.fromkeys((None, config.lora))
    ]
    by_guidance: dict[float | None, dict[Setting, None]] = {}
    for point in points:
        point = _simplest(point, own_guidance)
        group = by_guidance.setdefault(point.guidance, {})
        group.setdefault(Setting(None, None, point.guidance))
        group.setdefault(point)
    return [point for group in by_guidance.values() for point in group]


def _axes(config: SweepConfig) -> list[list[Callable[[Setting], Setting]]]:
    """What each value of each axis changes of a point."""

    def of_taca(**values: Any) -> Callable[[Setting], Setting]:
        def change(point: Setting) -> Setting:
            assert point.taca is not None  # the center's is not
            return replace(point, taca=replace(point.taca, **values))

        return change

    def of_point(**values: Any) -> Callable[[Setting], Setting]:
        return lambda point: replace(point, **values)

    return [
        [of_taca(gamma=gamma, knots=None) for gamma in config.gammas],
        [of_taca(threshold=threshold) for threshold in config.thresholds],
        [of_taca(schedule=schedule, knots=None) for schedule in config.schedules],
        [of_taca(cond_only=cond_only) for cond_only in config.cond_only],
        [of_point(lora=None if lora == "none" else lora) for lora in config.loras],
        [of_point(guidance=guidance) for guidance in config.guidances],
    ]


def _simplest(point: Setting, own_guidance: float) -> Setting:
    """The same attention with defaults in place of what does nothing: TACA at gamma 1 alone, the
    schedule of gamma 1, what knots and first_steps replace, and cond_only where there is no
    unconditional half."""
    taca = point.taca
    if taca is None:
        return point
    plain = taca.gamma == 1 and taca.knots is None
    if plain and point.lora is None:
        return Setting(None, None, point.guidance)
    if plain or taca.knots is not None or taca.first_steps is not None:
        taca = replace(taca, schedule="step")
    if taca.first_steps is not None:
        taca = replace(taca, threshold=TacaConfig.threshold)
    if taca.knots is not None:
        taca = replace(taca, gamma=TacaConfig.gamma)
    if plain or (own_guidance if point.guidance is None else point.guidance) <= 1:
        taca = replace(taca, cond_only=False)
    return replace(point, taca=taca)


def _learned(file: Path) -> TacaConfig:
    try:
        return from_json(TacaConfig, file.read_text(), str(file))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); train with gamma_knots"
        ) from None


def sweep(config: SweepConfig) -> None:
    """Draws and measures all settings, prints the table, and writes `config.out`/sweep.json and
    sweep.png.

    Raises UserError for problems that the user can fix.
    """
    need_matplotlib()
    from taca_jax.evaluation.shapes.sweep_figure import draw_figure

    out, files = Path(config.out), {"base": config.base}
    check_base(config)
    loras = _loras(settings(config, 1.0))  # the same ones whatever the model's guidance is
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


def _loras(points: Sequence[Setting]) -> list[str]:
    return [*dict.fromkeys(point.lora for point in points if point.lora is not None)]


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
