"""Measures how often the pictures of a shapes model show what held-out prompts say."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from taca_jax.data.shapes.captions import CATEGORIES
from taca_jax.data.shapes.examples import random_prompts
from taca_jax.evaluation.config import EvalConfig
from taca_jax.evaluation.shapes import check
from taca_jax.evaluation.statistics import paired_difference, share_interval
from taca_jax.parallel.processes import is_first
from taca_jax.pipelines.grids import caption_grid
from taca_jax.pipelines.pipeline import Pipeline, Variant
from taca_jax.taca import TacaConfig

PROMPT_SEED = 0
"""All evaluations use the same prompts, so that runs can be compared."""

_SHOWN = 2  # prompts per category in the picture


def variants(taca: TacaConfig | None, *, lora: bool) -> list[Variant]:
    """The variants to compare: the base; with a LoRA also TACA alone, both, and the LoRA alone."""
    base = Variant("base", None, 0.0)
    if not lora:
        return [base]
    taca = taca or TacaConfig()
    return [
        base,
        Variant("base + TACA", taca, 0.0),
        Variant("TACA + LoRA", taca, 1.0),
        Variant("LoRA alone", replace(taca, gamma=1.0), 1.0),
    ]


@dataclass(frozen=True)
class Alignment:
    """Each prompt with its category, and for each variant whether its picture is right."""

    categories: tuple[str, ...]
    prompts: tuple[str, ...]
    correct: Mapping[str, np.ndarray]


def measure(
    pipeline: Pipeline, which: Sequence[Variant], evaluate: EvalConfig
) -> tuple[Alignment, Image.Image]:
    """Samples every held-out prompt in each variant, from the same noise, and scores the pictures.

    Also returns a grid of the first prompts of each category, with a column for each variant.
    """
    categories, prompts = zip(*random_prompts("test", evaluate.prompts, PROMPT_SEED), strict=True)
    shown = [
        i for c in CATEGORIES for i in [j for j, x in enumerate(categories) if x == c][:_SHOWN]
    ]
    correct, seen = {}, {}
    for variant in which:
        images = np.concatenate(
            [
                _sample(pipeline, prompts, start, variant, evaluate)
                for start in track(
                    range(0, len(prompts), evaluate.batch_size),
                    f"sampling {variant.name}",
                    disable=not is_first(),
                )
            ]
        )
        pictures = np.round(images * 255).astype(np.uint8)
        correct[variant.name] = np.array(
            [check(p, x).correct for p, x in zip(prompts, pictures, strict=True)]
        )
        seen[variant.name] = pictures
    cells = [(v.name, i) for i in shown for v in which]
    grid = caption_grid(
        [Image.fromarray(seen[name][i]) for name, i in cells],
        [f"{'+' if correct[name][i] else '-'} {prompts[i]}" for name, i in cells],
        columns=len(which),
        headings=[v.name for v in which],
    )
    return Alignment(categories, prompts, correct), grid


def _sample(
    pipeline: Pipeline,
    prompts: Sequence[str],
    start: int,
    variant: Variant,
    evaluate: EvalConfig,
) -> np.ndarray:
    # The last batch is padded, so that all batches run the same compiled program.
    chosen = list(prompts[start : start + evaluate.batch_size])
    padded = chosen + chosen[-1:] * (evaluate.batch_size - len(chosen))
    images = pipeline(
        padded,
        steps=evaluate.steps,
        guidance=evaluate.guidance,
        seed=start,
        taca=variant.taca,
        lora_strength=variant.lora_strength,
        output="array",
        progress=False,
    ).images
    return np.asarray(images)[: len(chosen)]


def summary(alignment: Alignment) -> dict:
    """For JSON: shares with 95 % intervals by variant and category, and the paired difference of
    each variant from the first over all prompts. Prompts are the independent units, because some
    categories have fewer distinct prompts than pictures."""
    rows = {}
    base = next(iter(alignment.correct))
    of, prompts = np.array(alignment.categories), np.array(alignment.prompts)
    for name, correct in alignment.correct.items():
        groups = {c: of == c for c in dict.fromkeys(alignment.categories)}
        groups["all"] = np.full(len(of), True)
        rows[name] = {
            c: asdict(share_interval(correct[where], prompts[where].tolist()))
            for c, where in groups.items()
        }
        if name != base:
            difference = paired_difference(alignment.correct[base], correct, prompts.tolist())
            rows[name]["difference"] = asdict(difference)
    return rows


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """The summary as a table: % of prompts whose picture is right, with 95 % intervals."""
    names = list(rows)
    out = Table(title="Held-out prompts drawn right, % (95 % interval)")
    out.add_column("category")
    for name in names:
        out.add_column(name, justify="right")
    for category in [c for c in rows[names[0]] if c != "difference"]:
        shares = [rows[name][category] for name in names]
        cells = [
            f"{100 * s['value']:.1f} ({100 * s['low']:.1f}-{100 * s['high']:.1f})" for s in shares
        ]
        total, distinct = shares[0]["total"], shares[0]["prompts"]
        few = "" if distinct == total else f" of {distinct} prompts"
        out.add_row(f"{category}, n = {total}{few}", *cells, end_section=category == "all")
    if len(names) > 1:
        cells = [
            f"{100 * d['value']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f}), "
            f"p = {d['p_value']:.2g}"
            for d in (rows[name]["difference"] for name in names[1:])
        ]
        out.add_row(f"against {names[0]}, paired", "", *cells)
    return out


def evaluate_shapes(
    pipeline: Pipeline,
    evaluate: EvalConfig,
    run_dir: Path,
    *,
    taca: TacaConfig | None,
    lora: bool,
) -> None:
    """Measures `pipeline`, prints the table, and writes evaluation.json and evaluation.png into
    `run_dir`."""
    alignment, grid = measure(pipeline, variants(taca, lora=lora), evaluate)
    if not is_first():  # all processes sample together, and the first reports
        return
    rows = summary(alignment)
    (run_dir / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")
    grid.save(run_dir / "evaluation.png")
    Console(width=max(120, Console().width)).print(table(rows))
