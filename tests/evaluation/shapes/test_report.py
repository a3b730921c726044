"""The results as numbers and tables: shares, differences, the best prompts."""

import io
import json

import numpy as np
from rich.console import Console

from taca_jax.evaluation.shapes.alignment import Alignment
from taca_jax.evaluation.shapes.halves import Half
from taca_jax.evaluation.shapes.report import best_prompts, summary, table

HALF = Half("held-out", ("color", "color", "shape", "shape"), ("a", "b", "c", "d"))


def alignment_of(correct, exact=None):
    def as_arrays(scores):
        return {name: np.array(values, bool) for name, values in scores.items()}

    return Alignment(HALF, as_arrays(correct), as_arrays(exact or correct))


def summary_of(alignment, guidance=1.0):
    return summary(alignment, dict.fromkeys(alignment.correct, guidance))


def rendered(what):
    console = Console(width=160, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


TWO = {"base": [1, 0, 0, 0], "better": [1, 1, 1, 0]}


def test_differences_are_paired_and_against_the_first():
    rows = summary_of(alignment_of(TWO, {"base": [1, 0, 0, 0], "better": [0, 0, 1, 0]}))
    assert rows["base"]["correct"]["color"]["value"] == 0.5
    assert rows["better"]["correct"]["shape"]["value"] == 0.5
    assert rows["better"]["exact"]["all"]["value"] == 0.25
    assert "difference" not in rows["base"]
    difference = rows["better"]["difference"]
    assert difference["correct"]["value"] == 0.5
    assert (difference["correct"]["gained"], difference["correct"]["lost"]) == (2, 0)
    assert (difference["exact"]["gained"], difference["exact"]["lost"]) == (1, 1)
    assert json.loads(json.dumps(rows)) == rows


def test_the_table_shows_every_share_and_difference():
    exact = {"base": [0, 0, 0, 0], "better": [1, 1, 1, 0]}
    text = rendered(table("held-out", summary_of(alignment_of(TWO, exact), guidance=2.0)))
    assert "Held-out compositions drawn right, % (95 % interval)" in text
    for words in ("color, n = 2", "shape, n = 2", "all, n = 4", "guidance 2"):
        assert words in text
    right, inexact = text.split("all, nothing else drawn")
    assert "25.0 (4.6-69.9)" in right
    assert "0.0 (0.0-" in inexact
    for part, difference, p_value in ((right, "+50.0 (", "p = 0.5"), (inexact, "+75.0 (", "0.25")):
        assert "against base, paired" in part
        assert difference in part
        assert p_value in part
    assert "against" not in rendered(table("seen", summary_of(alignment_of({"base": [1] * 4}))))


def test_several_pictures_of_a_prompt_are_not_so_many_prompts():
    half = Half("seen", ("color",) * 4, ("a", "a", "b", "b"))
    right = {"base": np.array([1, 1, 0, 0], bool)}
    rows = summary(Alignment(half, right, right), {"base": 1.0})
    assert rows["base"]["correct"]["all"]["prompts"] == 2
    assert "color, n = 4 of 2 prompts" in rendered(table("seen", rows))


def test_the_best_prompts_come_first_with_the_seeds_that_draw_them():
    prompts = tuple(prompt for prompt in "abcdef" for _ in range(2))  # f is never drawn right
    half = Half("seen", ("color",) * 8 + ("shape",) * 4, prompts)
    exact = {
        "base": np.array([0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0], bool),
        "other": np.array([1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0], bool),
    }
    lines = rendered(best_prompts(Alignment(half, exact, exact), 2, seed=10)).splitlines()
    assert "Seen prompts drawn best: pictures exact of 2" in lines[0]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells == [
        ["color", "d", "16 to 17", "2", "2"],
        ["color", "b", "12 to 13", "2", "0"],
        ["color", "c", "14 to 15", "1", "0"],
        ["shape", "e", "18 to 19", "1", "0"],
    ]
