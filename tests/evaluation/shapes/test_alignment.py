"""The measurement of alignment: what it asks for, how it draws, what it scores and shows."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from taca_jax.data.shapes.captions import CATEGORIES, held_out, parse_caption
from taca_jax.errors import UserError
from taca_jax.evaluation.shapes.alignment import Alignment, best_guidance, measure, variants
from taca_jax.evaluation.shapes.halves import Half, make_halves
from taca_jax.evaluation.shapes.sampler import Sampler
from taca_jax.pipelines.config import Variant
from taca_jax.taca import TacaConfig
from tests.evaluation.shapes.painter import Painter, grey, picture_of, right

TACA = TacaConfig(gamma=1.3, threshold=900)
BASE = variants(None, lora=False, guidances=(None,))
HALVES = make_halves(2)


def test_without_taca_the_base_alone_is_measured():
    (base,) = variants(None, lora=False, guidances=(None,))
    assert base == Variant("base", None, 0.0, None)
    # A LoRA that acts without TACA is always on.
    base, with_lora = variants(None, lora=True, guidances=(None,))
    assert base == Variant("base", None, 0.0, None)
    assert with_lora == Variant("base + LoRA", None, 1.0, None)
    base, with_taca = variants(TACA, lora=False, guidances=(2.0,))
    assert base == Variant("base", None, 0.0, 2.0)
    assert with_taca == Variant("base + TACA", TACA, 0.0, 2.0)


def test_with_a_lora_four_ways_are_compared():
    base, without, both, alone = variants(TACA, lora=True, guidances=(None,))
    assert (base.taca, base.lora_strength) == (None, 0.0)
    assert (without.taca, without.lora_strength) == (TACA, 0.0)
    assert (both.taca, both.lora_strength) == (TACA, 1.0)
    # The LoRA where TACA would act, without its temperature.
    assert (alone.taca, alone.lora_strength) == (dataclasses.replace(TACA, gamma=1.0), 1.0)


def test_several_strengths_of_guidance_are_variants_too():
    columns = variants(None, lora=False, guidances=(1.0, 2.5))
    assert [(v.name, v.guidance) for v in columns] == [("guidance 1", 1.0), ("guidance 2.5", 2.5)]
    columns = variants(TACA, lora=False, guidances=(1.0, 3.0))
    assert [(v.name, v.guidance) for v in columns] == [
        ("base, guidance 1", 1.0),
        ("base + TACA, guidance 1", 1.0),
        ("base, guidance 3", 3.0),
        ("base + TACA, guidance 3", 3.0),
    ]


def test_one_half_is_seen_in_training_and_the_other_never():
    seen, unseen = make_halves(2)
    assert (seen, unseen) == make_halves(2)
    assert [seen.name, unseen.name] == ["seen", "held-out"]
    assert not [prompt for prompt in seen.prompts if held_out(parse_caption(prompt))]
    assert all(held_out(parse_caption(prompt)) for prompt in unseen.prompts)
    for half in (seen, unseen):
        assert half.categories == tuple(c for c in CATEGORIES for _ in range(2))
        assert len(set(half.prompts)) == 12
    thrice, _ = make_halves(2, num_images=3)
    assert thrice.prompts == tuple(prompt for prompt in seen.prompts for _ in range(3))


@pytest.mark.parametrize(("paint", "expected"), [(right, True), (grey, False)])
def test_right_pictures_score_all_and_empty_ones_nothing(paint, expected):
    alignments, _ = measure(Sampler(Painter(paint), batch_size=5), BASE, HALVES)
    assert [each.half for each in alignments] == list(HALVES)
    for each in alignments:
        for scored in (each.correct, each.exact):
            assert scored["base"].tolist() == [expected] * 12


def test_an_object_too_many_makes_a_right_picture_inexact():
    def crowded(prompt, options):
        return picture_of("a red circle and a blue square and a green cross")

    half = Half("seen", CATEGORIES, ("a red circle",) * 3 + ("two red circles",) * 3)
    [alignment], _ = measure(Sampler(Painter(crowded), batch_size=6), BASE, [half])
    assert alignment.correct["base"].tolist() == [True] * 3 + [False] * 3
    assert not alignment.exact["base"].any()


def test_every_variant_draws_the_same_prompts_from_the_same_noise():
    painter = Painter(grey)
    which = variants(TACA, lora=True, guidances=(2.5,))
    measure(Sampler(painter, batch_size=5, steps=7, seed=100), which, HALVES)
    batches = 3  # 12 prompts, 5 at a time
    assert len(painter.calls) == 2 * 4 * batches
    asked = [painter.calls[i * batches : (i + 1) * batches] for i in range(8)]
    for i, calls in enumerate(asked):
        same = asked[i // 4 * 4]
        for (prompts, options), (first_prompts, first) in zip(calls, same, strict=True):
            assert (prompts, options["seed"]) == (first_prompts, first["seed"])
            assert options["taca"] == which[i % 4].taca
            assert options["lora_strength"] == which[i % 4].lora_strength
            assert (options["steps"], options["guidance"]) == (7, 2.5)
    assert {len(prompts) for prompts, _ in painter.calls} == {5}  # one compiled program


@pytest.mark.parametrize("batch_size", [1, 5, 12, 50])
def test_the_noise_of_a_prompt_does_not_depend_on_the_batches(batch_size):
    painter = Painter(grey)
    Sampler(painter, batch_size, seed=7).draw(HALVES[0], BASE[0])
    # Picture i of a call starts from the noise of its seed + i.
    drawn = [
        (prompt, options["seed"] + i)
        for prompts, options in painter.calls
        for i, prompt in enumerate(prompts)
    ]
    assert drawn[:12] == [(prompt, 7 + i) for i, prompt in enumerate(HALVES[0].prompts)]


def test_kept_pictures_are_not_drawn_again(tmp_path):
    def noisy(prompt, options):
        seed = sum(map(ord, prompt)) + options["seed"]
        return np.random.default_rng(seed).integers(0, 256, (40, 48, 3))

    first = Sampler(Painter(noisy), batch_size=5, kept=tmp_path).draw(HALVES[1], BASE[0])
    assert first.shape == (12, 40, 48, 3)
    np.testing.assert_array_equal(first, Sampler(Painter(noisy), 5).draw(HALVES[1], BASE[0]))
    damaged, second, _ = sorted(tmp_path.iterdir())
    second.unlink()
    again = Painter(noisy)
    np.testing.assert_array_equal(Sampler(again, 5, kept=tmp_path).draw(HALVES[1], BASE[0]), first)
    assert [options["seed"] for _, options in again.calls] == [5]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=r"held-out-000000-\w+\.png cannot be read .*; remove it"):
        Sampler(again, 5, kept=tmp_path).draw(HALVES[1], BASE[0])


def test_the_grid_shows_each_category_of_each_half_in_each_variant():
    which = variants(TACA, lora=False, guidances=(None,))
    _, grid = measure(Sampler(Painter(right), 12), which, HALVES)
    _, one_half = measure(Sampler(Painter(right), 12), which, HALVES[:1])
    assert isinstance(grid, Image.Image)
    assert grid.width == one_half.width > 2 * 520
    assert one_half.height > 6 * 520
    assert grid.height > 12 * 520


def test_the_best_guidance_is_that_of_seen_compositions():
    which = variants(None, lora=False, guidances=(1.0, 2.0, 3.0))
    seen = {name: np.array(of, bool) for name, of in scores([0, 1], [1, 1], [1, 1]).items()}
    other = {name: np.array(of, bool) for name, of in scores([1, 1], [0, 0], [1, 1]).items()}
    half = Half("seen", ("color", "color"), ("a", "b"))
    held = dataclasses.replace(half, name="held-out")
    found = best_guidance([Alignment(held, other, other), Alignment(half, seen, other)], which)
    assert found == 2.0


def scores(*each):
    return {f"guidance {i}": of for i, of in enumerate(each, start=1)}
