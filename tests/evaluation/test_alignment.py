"""The measurement of alignment: what it scores, what it asks for, what it shows."""

import dataclasses
import io
import json
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from taca_jax.data.shapes.captions import CATEGORIES, held_out, parse_caption
from taca_jax.data.shapes.drawing import draw, place
from taca_jax.data.shapes.examples import _complete
from taca_jax.evaluation.alignment import (
    Alignment,
    evaluate_shapes,
    measure,
    summary,
    table,
    variants,
)
from taca_jax.evaluation.config import EvalConfig
from taca_jax.taca import TacaConfig

TACA = TacaConfig(gamma=1.3, threshold=900)
SMALL = EvalConfig(prompts=2, steps=1, batch_size=5)
BASE = variants(None, lora=False)


class Painter:
    """Stands in for a pipeline: `paint(prompt)` is what it draws; it remembers its calls."""

    def __init__(self, paint):
        self.paint = paint
        self.calls = []

    def __call__(self, prompts, **options):
        self.calls.append((tuple(prompts), options))
        pictures = np.stack([self.paint(prompt) for prompt in prompts])
        return SimpleNamespace(images=pictures.astype(np.float32) / 255)


def right(prompt):
    description, random = parse_caption(prompt), Random(0)
    return draw(place(_complete(description, random), description.relation, random))


def grey(prompt):
    return np.full((40, 40, 3), 216, np.uint8)


def test_without_a_lora_the_base_alone_is_measured():
    (base,) = variants(TACA, lora=False)
    assert (base.name, base.taca, base.lora_strength) == ("base", None, 0.0)


@pytest.mark.parametrize("taca", [TACA, None])
def test_with_a_lora_four_ways_are_compared(taca):
    base, without, both, alone = variants(taca, lora=True)
    used = taca or TacaConfig()
    assert (base.taca, base.lora_strength) == (None, 0.0)
    assert (without.taca, without.lora_strength) == (used, 0.0)
    assert (both.taca, both.lora_strength) == (used, 1.0)
    # The LoRA where TACA would act, without its temperature.
    assert (alone.taca, alone.lora_strength) == (dataclasses.replace(used, gamma=1.0), 1.0)


@pytest.mark.parametrize(("paint", "expected"), [(right, 1.0), (grey, 0.0)])
def test_right_pictures_score_all_and_empty_ones_nothing(paint, expected):
    alignment, _ = measure(Painter(paint), BASE, SMALL)
    rows = summary(alignment)
    for category in (*CATEGORIES, "all"):
        assert rows["base"][category]["value"] == expected, category
    assert rows["base"]["all"]["total"] == 2 * len(CATEGORIES)
    assert "difference" not in rows["base"]


def test_prompts_are_held_out_and_always_the_same():
    one, _ = measure(Painter(grey), BASE, SMALL)
    two, _ = measure(Painter(grey), BASE, SMALL)
    assert one.prompts == two.prompts
    assert one.categories == tuple(c for c in CATEGORIES for _ in range(2))
    assert all(held_out(parse_caption(prompt)) for prompt in one.prompts)


def test_every_variant_draws_the_same_prompts_from_the_same_noise():
    painter = Painter(grey)
    which = variants(TACA, lora=True)
    measure(painter, which, dataclasses.replace(SMALL, steps=7, guidance=2.5))
    batches = len(painter.calls) // len(which)
    assert batches == 3  # 12 prompts, 5 at a time
    asked = [painter.calls[i * batches : (i + 1) * batches] for i in range(len(which))]
    for variant, calls in zip(which, asked, strict=True):
        assert [(prompts, options["seed"]) for prompts, options in calls] == [
            (prompts, options["seed"]) for prompts, options in asked[0]
        ]
        for _, options in calls:
            assert options["taca"] == variant.taca
            assert options["lora_strength"] == variant.lora_strength
            assert (options["steps"], options["guidance"]) == (7, 2.5)
    assert {len(prompts) for prompts, _ in painter.calls} == {5}  # one compiled program


@pytest.mark.parametrize("batch_size", [1, 5, 12, 50])
def test_the_noise_of_a_prompt_does_not_depend_on_the_batches(batch_size):
    painter = Painter(grey)
    alignment, _ = measure(painter, BASE, dataclasses.replace(SMALL, batch_size=batch_size))
    # Picture i of a call starts from the noise of its seed + i.
    drawn = [
        (prompt, options["seed"] + i)
        for prompts, options in painter.calls
        for i, prompt in enumerate(prompts)
    ]
    assert drawn[:12] == [(prompt, i) for i, prompt in enumerate(alignment.prompts)]


def alignment_of(**correct):
    return Alignment(
        ("color", "color", "shape", "shape"),
        ("a", "b", "c", "d"),
        {name: np.array(values, bool) for name, values in correct.items()},
    )


def test_differences_are_paired_and_against_the_first():
    rows = summary(alignment_of(base=[1, 0, 0, 0], better=[1, 1, 1, 0]))
    assert rows["base"]["color"]["value"] == 0.5
    assert rows["better"]["shape"]["value"] == 0.5
    difference = rows["better"]["difference"]
    assert difference["value"] == 0.5
    assert (difference["gained"], difference["lost"]) == (2, 0)
    assert json.loads(json.dumps(rows)) == rows


def rendered(alignment):
    console = Console(width=160, file=io.StringIO())
    console.print(table(summary(alignment)))
    return console.file.getvalue()


def test_the_table_shows_every_share_and_difference():
    text = rendered(alignment_of(base=[1, 0, 0, 0], better=[1, 1, 1, 0]))
    for words in ("color, n = 2", "shape, n = 2", "all, n = 4", "against base, paired"):
        assert words in text
    assert "25.0 (4.6-69.9)" in text
    assert "+50.0 (" in text
    assert "p = 0.5" in text
    assert "against" not in rendered(alignment_of(base=[1, 0, 0, 0]))


def test_results_are_written_and_printed(tmp_path, capsys):
    evaluate_shapes(Painter(right), SMALL, tmp_path, taca=TACA, lora=True)
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    assert rows["TACA + LoRA"]["all"]["value"] == 1.0
    assert (tmp_path / "evaluation.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "Held-out prompts drawn right" in printed
    assert "100.0 (" in printed
