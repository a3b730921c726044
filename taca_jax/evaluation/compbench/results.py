"""The scores of runs: their means, and their differences on the same pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.categories import METRICS
from taca_jax.evaluation.compbench.folders import (
    categories_in,
    prompts_of,
    read_result,
    result_file,
)
from taca_jax.evaluation.compbench.journal import JOURNAL, settings_of
from taca_jax.evaluation.means import Mean, MeanDifference, mean_difference, mean_interval


@dataclass(frozen=True)
class Scores:
    """The scores of one category of a run by picture, and each picture's prompt.

    settings: what our scorer was set to; None if the result is of another program.
    """

    values: Mapping[int, float]
    prompts: Mapping[int, str]
    settings: Mapping[str, Any] | None


Run = Mapping[str, Scores]
"""The scores of a run, by category."""


def read_run(folder: Path) -> Run:
    """The scores of a run. Raises UserError if it has none."""
    found: dict[str, Scores] = {}
    for category in categories_in(folder):
        file = result_file(folder / category, METRICS[category])
        if not file.is_file():
            continue
        values = read_result(file)
        prompts = prompts_of(folder / category, values)
        found[category] = Scores(values, prompts, settings_of(file.with_name(JOURNAL)))
    if not found:
        raise UserError(f"{folder} has no scores; `compbench score pictures={folder}` makes some")
    return found


def means(run: Run) -> dict[str, Mean]:
    return {
        category: mean_interval(
            list(scores.values.values()), [scores.prompts[n] for n in scores.values]
        )
        for category, scores in run.items()
    }


def differences(first: Run, other: Run) -> dict[str, MeanDifference]:
    """The paired differences, over the pictures that both runs have.

    Raises UserError if a picture has another prompt in the other run.
    """
    found: dict[str, MeanDifference] = {}
    for category in [each for each in first if each in other]:
        a, b = first[category], other[category]
        both = sorted(a.values.keys() & b.values.keys())
        for number in both:
            if a.prompts[number] != b.prompts[number]:
                raise UserError(
                    f"{category}: picture {number} is of {a.prompts[number]!r} in the first run "
                    f"and of {b.prompts[number]!r} in another; report them apart"
                )
        if both:
            found[category] = mean_difference(
                [a.values[n] for n in both],
                [b.values[n] for n in both],
                [a.prompts[n] for n in both],
            )
    return found
