"""`compbench sweep`: compares many settings of TACA on T2I-CompBench, each with the plain base.

Each setting has a folder as `compbench generate` writes it, which is completed when the sweep is
started again, and which `compbench report` reads too.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from taca_jax.config.json_text import to_tree
from taca_jax.evaluation.compbench.categories import METRICS
from taca_jax.evaluation.compbench.config import PicturesConfig, ScoreConfig, SweepConfig
from taca_jax.evaluation.compbench.generate import all_prompts, check_folder, draw, joined
from taca_jax.evaluation.compbench.prompts import Lists, read_lists
from taca_jax.evaluation.compbench.report import gap_text, mean_text
from taca_jax.evaluation.compbench.results import Run, read_run
from taca_jax.evaluation.compbench.score import open_judges, score_run
from taca_jax.evaluation.means import Mean, MeanDifference, mean_difference, mean_interval
from taca_jax.evaluation.sweeps import EACH_ALONE, Setting, loras_of, settings
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.processes import is_first, print_once, wait_for_all
from taca_jax.pipelines.checks import check_evaluation
from taca_jax.pipelines.generate import load_pipeline, local_mesh
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import describe_steps
from taca_jax.telling.start import say_fact, wrapped

RESULTS = "sweep.json"

_LONGEST = 100
"""Characters of a folder's name, beyond which it is cut and numbered by its content."""


def sweep(config: SweepConfig) -> None:
    """Draws and scores all settings, prints a table for each metric, and writes
    `config.out`/sweep.json.

    If there are several processes, all must call this; each draws a share of every setting's
    pictures, and scores a share of the settings. Raises UserError for problems that the user can
    fix, before anything is drawn.
    """
    with joined():
        scoring = config.scoring
        # On CPUs processes must meet within 30 s at first, and checks may take one longer.
        wait_for_all("a sweep")
        lists = read_lists(config.prompts, config.categories)
        loras = loras_of(settings(config, 1.0))  # the same ones whatever the model's guidance is
        plain = replace(config, lora=None)
        stored = check_evaluation(plain, all_prompts(lists), loras)
        points = settings(config, stored.settings.guidance)
        runs = {point: pictures_config(config, point) for point in points}
        for each in runs.values():
            check_folder(each, lists)
        _check_scorers(scoring, config, lists)
        print_once(f"{len(points)} settings, {_count(config, lists)} pictures each")
        loaded = _Loaded()
        for each in runs.values():
            draw(each, lists, loaded.pipeline_of)
        del loaded  # to make room for the scorers
        _score(scoring, list(runs.values()))
        wait_for_all("all scores")
        if is_first():
            _report(config, lists, runs, stored.settings.guidance)


def pictures_config(config: SweepConfig, point: Setting) -> PicturesConfig:
    """What `compbench generate` is to draw for one setting."""
    shared = {field.name: getattr(config, field.name) for field in fields(PicturesConfig)}
    return PicturesConfig(
        **shared
        | {
            "taca": point.taca,
            "lora": point.lora,
            "guidance": point.guidance,
            "out": str(Path(config.out, folder_name(point))),
        }
    )


def folder_name(point: Setting) -> str:
    """The name of a setting's folder: `gamma-1.2-step-t-970-no-LoRA`."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", point.name)
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(point.name.encode()).hexdigest()[:8]}"


class _Loaded:
    """The pipeline of a sweep, loaded when it is first needed, with one setting's LoRA after the
    other."""

    def __init__(self):
        self._pipeline: Pipeline | None = None

    def pipeline_of(self, config: PicturesConfig) -> Pipeline:
        if self._pipeline is None:
            plain = replace(config, lora=None, taca=None)
            self._pipeline = load_pipeline(plain, local_mesh(plain))
        pipeline = self._pipeline
        pipeline.unload_lora()
        if config.lora is not None:
            for said in pipeline.load_lora(config.lora).splitlines():
                say_fact("LoRA", said)
        if config.taca is not None:
            times = pipeline.timesteps(config.height, config.width, config.steps)
            print_once(wrapped(describe_steps(config.taca, times)))
        return pipeline


def _check_scorers(scoring: ScoreConfig, config: SweepConfig, lists: Lists) -> None:
    """Raises UserError unless the scorers are there and can judge all prompts; they are loaded for
    that, and again when all is drawn."""
    for judge in open_judges(scoring):
        for category in judge.categories:
            judge.check(list(lists.get(category, ()))[: config.limit])


def _count(config: SweepConfig, lists: Lists) -> int:
    return sum(len(prompts[: config.limit]) for prompts in lists.values()) * config.num_images


def _score(scoring: ScoreConfig, runs: Sequence[PicturesConfig]) -> None:
    """Scores this process's share of the settings."""
    share = runs[jax.process_index() :: jax.process_count()]
    judges = open_judges(scoring) if share else []
    for pictures in share:
        print(f"{pictures.out}:")
        score_run(Path(pictures.out), judges, scoring.batch_size)


def _report(
    config: SweepConfig,
    lists: Lists,
    runs: Mapping[Setting, PicturesConfig],
    own_guidance: float,
) -> None:
    rows: list[dict[str, Any]] = []
    first: Run = {}
    for point, pictures in runs.items():
        run = read_run(Path(pictures.out))
        if point.taca is None:  # the base of its guidance, which is the first of it
            first = run
        rows.append(
            {
                "name": point.name,
                "folder": Path(pictures.out).name,
                "taca": None if point.taca is None else to_tree(point.taca),
                "lora": point.lora,
                "guidance": own_guidance if point.guidance is None else point.guidance,
                "scores": summary(first, run, lists, config),
            }
        )
    file = Path(config.out, RESULTS)
    with whole_file(file) as made:
        made.write_text(json.dumps(rows, indent=1) + "\n")
    console = Console()
    for metric in rows[0]["scores"]:
        console.print(table(metric, rows))
        console.print(best(metric, rows), markup=False, highlight=False)
    print(f"wrote {file}; `compbench report runs=` on folders in {config.out} shows categories")


def summary(first: Run, run: Run, lists: Lists, config: SweepConfig) -> dict[str, Any]:
    """For JSON: the scores of a run by metric, of all its categories together and of each of them:
    mean with its 95 % interval, and the paired difference from the first run unless it is that.

    Only the pictures that are configured count, and not others that a folder has.
    """

    def compared(categories: Sequence[str]) -> dict[str, Any]:
        places = [
            (category, number)
            for category in categories
            for number in range(len(lists[category][: config.limit]) * config.num_images)
        ]
        prompts = [(category, run[category].prompts[number]) for category, number in places]
        ours, theirs = (
            np.array([each[category].values[number] for category, number in places])
            for each in (run, first)
        )
        found = {"mean": asdict(mean_interval(ours, prompts))}
        if run is not first:
            found["difference"] = asdict(mean_difference(theirs, ours, prompts))
        return found

    by_metric: dict[str, list[str]] = {}
    for category in lists:
        by_metric.setdefault(METRICS[category].name, []).append(category)
    return {
        metric: {
            **compared(categories),
            "categories": {category: compared([category]) for category in categories},
        }
        for metric, categories in by_metric.items()
    }


def table(metric: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The settings: mean score of one metric, and the paired difference from the plain base."""
    scores = [row["scores"][metric] for row in rows]
    mean = scores[0]["mean"]
    out = Table(
        title=f"{metric} of {', '.join(scores[0]['categories'])}: {mean['total']} pictures of "
        f"{mean['prompts']} prompts (95 %; prompts are the units)",
        caption=EACH_ALONE,
    )
    out.add_column("setting", overflow="fold")
    for heading in ("score", "against base"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row, found in zip(rows, scores, strict=True):
        gap = found.get("difference")
        out.add_row(
            escape(row["name"]),
            mean_text(Mean(**found["mean"])),
            "" if gap is None else gap_text(MeanDifference(**gap)),
        )
    return out


def best(metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The setting that gains most over its base, in a sentence, and what that is worth."""
    gains = [
        (row["scores"][metric]["difference"], row["name"])
        for row in rows
        if "difference" in row["scores"][metric]
    ]
    if not gains:
        return f"{metric}: nothing is compared with the base; give gammas= or thresholds="
    gap, name = max(gains, key=lambda each: each[0]["value"])
    if gap["low"] is None or gap["low"] <= 0:
        return (
            f"{metric}: no setting is better than the base beyond chance; the highest is {name}. "
            "More prompts (limit=) say more"
        )
    return (
        f"{metric}: the highest is {name}. Chosen by these pictures, it looks better than it is: "
        "draw it and the base once more with another seed= and out="
    )
