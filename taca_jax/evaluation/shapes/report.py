"""The results of an evaluation on shapes as numbers and as tables."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from taca_jax.evaluation.shapes.alignment import Alignment
from taca_jax.evaluation.statistics import paired_difference, share_interval

LISTED = 3
"""Prompts of each category that `best_prompts` lists."""

MEASURES = {"correct": "all", "exact": "all, nothing else drawn"}
"""What is measured, and the table's word for it over all categories."""


def summary(alignment: Alignment, guidances: Mapping[str, float]) -> dict[str, Any]:
    """For JSON: what each variant drew of a half, by the variant's name.

    Of each: its guidance; for `correct` and `exact` the shares with 95 % intervals, by category and
    of all; and their paired differences from the first variant's. Prompts are the independent
    units, so that several pictures of a prompt do not count as so many.
    """
    half = alignment.half
    of, prompts = np.array(half.categories), np.array(half.prompts)
    groups = {category: of == category for category in dict.fromkeys(half.categories)}
    groups["all"] = np.full(len(of), True)
    measured = {"correct": alignment.correct, "exact": alignment.exact}
    first = next(iter(alignment.correct))
    rows: dict[str, Any] = {}
    for variant in alignment.correct:
        rows[variant] = {"guidance": guidances[variant]}
        for measure, right in measured.items():
            rows[variant][measure] = {
                group: asdict(share_interval(right[variant][where], prompts[where].tolist()))
                for group, where in groups.items()
            }
        if variant != first:
            rows[variant]["difference"] = {
                measure: asdict(paired_difference(right[first], right[variant], prompts.tolist()))
                for measure, right in measured.items()
            }
    return rows


def table(half: str, rows: Mapping[str, Any]) -> Table:
    """The summary of a half as a table: % of its pictures that are right, with 95 % intervals."""
    names = list(rows)
    first = rows[names[0]]
    out = Table(title=f"{half.capitalize()} compositions drawn right, % (95 % interval)")
    out.add_column("category")
    for name in names:
        out.add_column(name, justify="right")
    for category in [group for group in first["correct"] if group != "all"]:
        shares = [rows[name]["correct"][category] for name in names]
        total, prompts = shares[0]["total"], shares[0]["prompts"]
        several = "" if prompts == total else f" of {prompts} prompts"
        out.add_row(f"{category}, n = {total}{several}", *map(share_text, shares))
    for measure, words in MEASURES.items():
        out.add_section()
        shares = [rows[name][measure]["all"] for name in names]
        count = f", n = {shares[0]['total']}" if measure == "correct" else ""
        out.add_row(f"{words}{count}", *map(share_text, shares))
        if len(names) > 1:
            differences = [rows[name]["difference"][measure] for name in names[1:]]
            out.add_row(f"against {names[0]}, paired", "", *map(difference_text, differences))
    guidances = dict.fromkeys(f"{row['guidance']:g}" for row in rows.values())
    if len(guidances) == 1:
        out.caption = f"guidance {next(iter(guidances))}"
    return out


def share_text(share: Mapping[str, float]) -> str:
    """A share and its interval, in %: `9.8 (7.7-12.5)`."""
    return f"{100 * share['value']:.1f} ({100 * share['low']:.1f}-{100 * share['high']:.1f})"


def difference_text(difference: Mapping[str, float]) -> str:
    """A difference and its interval, in points, and under them the p-value."""
    value, low, high = (100 * difference[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})\np = {difference['p_value']:.2g}"


def best_prompts(alignment: Alignment, num_images: int, seed: int) -> Table:
    """The prompts of each category whose pictures are most often exact, in the first variant and
    then in all; prompts without an exact picture are left out.

    num_images: pictures of each prompt, whose noise is that of consecutive seeds; `seed` is the
      first's.
    """
    half, names = alignment.half, list(alignment.exact)
    # [prompts, variants]: how many of the pictures are exact.
    counts = np.stack(
        [exact.reshape(-1, num_images).sum(axis=1) for exact in alignment.exact.values()], axis=1
    )
    out = Table(
        title=f"{half.name.capitalize()} prompts drawn best: pictures exact of {num_images}"
    )
    for heading in ("category", "prompt", "seeds"):
        out.add_column(heading)
    for name in names:
        out.add_column(name, justify="right")
    categories, prompts = half.categories[::num_images], half.prompts[::num_images]
    for category in dict.fromkeys(categories):
        members = [i for i, each in enumerate(categories) if each == category and counts[i].any()]
        members.sort(key=lambda i: (-counts[i, 0], -counts[i].sum()))
        for i in members[:LISTED]:
            first = seed + i * num_images
            seeds = f"{first} to {first + num_images - 1}"
            out.add_row(category, prompts[i], seeds, *map(str, counts[i]))
        out.add_section()
    return out
