"""The command `attention`: from a model's folder to figures and numbers."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.evaluation import attention_maps
from taca_jax.evaluation.attention_maps import command
from taca_jax.evaluation.attention_maps.config import AttentionConfig
from taca_jax.evaluation.attention_maps.measuring import Measured, tokens_of_words
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.stages import Staged
from taca_jax.taca import TacaConfig
from taca_jax.text.words import words_of
from taca_jax.weights.lora_files import write_lora
from tests.evaluation.weights import change_last_byte
from tests.training.tiny import TEXT_LENGTH, tiny_pipeline

PROMPT = "two red circles"
TACA = TacaConfig(gamma=1.5, threshold=800)
STEPS, PICTURES = 3, 3
FIGURES = {"text.png", "heads.png", "difference.png", "x0.png", "words.png", "alignment.png"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention") / "base"
    tiny_pipeline().save(folder)
    return folder


def settings(base, folder, **changes):
    values = {
        "base": str(base),
        "taca": TACA,
        "steps": STEPS,
        "dtype": "float32",
        "prompt": f"{PROMPT} | a striped cross",
        "num_images": PICTURES,
        "gammas": (1.0, 1.5),
        "batch_size": 4,
        "out": str(folder),
    }
    return AttentionConfig(**(values | changes))


@pytest.fixture(scope="module")
def analysis(base, tmp_path_factory):
    """The configuration of an analysis that has run, and what it measured."""
    pytest.importorskip("matplotlib")
    config = settings(base, tmp_path_factory.mktemp("analysis") / "out")
    return config, command.run(config)


def test_it_writes_figures_and_numbers(analysis):
    config, found = analysis
    out = command.Path(config.out)
    assert {path.name for path in out.glob("*.png")} == FIGURES
    for name in FIGURES:
        with Image.open(out / name) as figure:
            figure.load()
            assert min(figure.size) > 300
    numbers = json.loads((out / "attention.json").read_text())
    assert list(numbers["variants"]) == list(found) == ["plain", "gamma 1.5"]
    plain, taca = numbers["variants"].values()
    assert len(numbers["timesteps"]) == STEPS
    assert taca["gamma"] == [1.5 if t >= TACA.threshold else 1.0 for t in numbers["timesteps"]]
    assert taca["gamma"] != plain["gamma"] == [1.0] * STEPS
    assert plain["text_ratio"] == [1.0] * STEPS
    assert taca["text_ratio"][0] != 1.0
    assert list(plain["words"]) == words_of(PROMPT)
    for variant in (plain, taca):
        assert np.shape(variant["text_by_layer_and_head"]) == (STEPS, 2, 2)
        text = np.mean(variant["text_by_layer_and_head"], axis=(1, 2))
        np.testing.assert_allclose(text, variant["text"], atol=1e-5)
        assert np.all(np.sum([*variant["words"].values()], axis=0) < 1)
        assert 0 <= min(variant["claims"]) <= max(variant["claims"]) <= 1


def test_the_pictures_are_those_of_an_unobserved_run(analysis, base):
    config, found = analysis
    pipeline = Pipeline.from_pretrained(base, "float32")
    batch = [PROMPT] * PICTURES + ["a striped cross"]
    for measured, taca in zip(found.values(), (None, TACA), strict=True):
        images = pipeline(batch, steps=STEPS, seed=config.seed, taca=taca, output="array").images
        assert np.array_equal(measured.drawn, np.round(images[:2] * 255).astype(np.uint8))
        assert np.array_equal(measured.film[-1], measured.drawn)
        assert measured.drawn.std() > 1


def test_what_was_measured_fits_together(analysis):
    _, found = analysis
    for measured in found.values():
        words = len(words_of(PROMPT))
        assert measured.heads.shape == (STEPS, 2 * PICTURES, 1 + words, 2, 2)
        assert measured.maps.shape == (STEPS, 2, 1 + words, 10, 10)
        assert measured.claims.shape == (STEPS, 2 * PICTURES)
        at_places, by_head = measured.maps.mean(axis=(3, 4)), measured.heads.mean(axis=(3, 4))
        np.testing.assert_allclose(at_places, by_head[:, :2], rtol=1e-5)
        assert np.all(measured.heads[:, :PICTURES] > 0)
        assert not np.any(measured.heads[:, PICTURES:, 1:])  # words are of the first prompt
    plain, taca = found.values()
    differ = np.abs(taca.heads - plain.heads).max(axis=(1, 2, 3, 4))
    assert differ[0] > 1e-3


def test_an_interrupted_analysis_is_completed(analysis, monkeypatch):
    from taca_jax.evaluation.attention_maps import figures

    config, found = analysis
    arrays = command.Path(config.out) / "arrays"
    (arrays / "gamma-1.5.npz").unlink()
    measured = []

    def counted(pipeline, config, variant, batches, **options):
        measured.append(variant.name)
        return command_measure(pipeline, config, variant, batches, **options)

    command_measure = command.measure
    monkeypatch.setattr(command, "measure", counted)
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    again = command.run(config)
    assert measured == ["gamma 1.5"]
    for name, each in found.items():
        for field, array in vars(each).items():
            assert np.array_equal(getattr(again[name], field), array)
            assert np.array_equal(
                getattr(Measured.load(arrays / f"{name.replace(' ', '-')}.npz"), field), array
            )


def test_in_stages_text_is_read_once_and_all_is_the_same(analysis, tmp_path, monkeypatch):
    config, found = analysis
    reads = []

    def read(staged):
        reads.append(staged.config)
        return staged_read(staged)

    staged_read = Staged.read
    monkeypatch.setattr(Staged, "read", read)
    again = command.run(replace(config, stages=True, out=str(tmp_path / "out")))
    kinds = [type(each).__name__ for each in reads]
    assert kinds == ["NoneType", *2 * ["FluxConfig", "PixelsConfig"]]
    for name, each in found.items():
        for field, array in vars(each).items():
            assert np.array_equal(getattr(again[name], field), array)


def test_another_analysis_and_other_files_are_left_alone(analysis, base, tmp_path):
    config, _ = analysis
    with pytest.raises(UserError, match="seed is 0 there, 1 here; name another out"):
        command.run(settings(base, config.out, seed=1))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else; name another out"):
        command.run(settings(base, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_lora_that_was_trained_anew_is_noticed(base, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out"
    model = tiny_pipeline().transformer
    add_lora(model, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    write_lora(lora, model)

    class Measuring(BaseException):
        pass

    def measuring(*_, **__):
        raise Measuring

    monkeypatch.setattr(command, "measure", measuring)
    for folder in (out, out, tmp_path / "moved"):  # it begins, goes on, and goes on elsewhere
        if folder != out:
            out.rename(folder)
        with pytest.raises(Measuring):
            command.run(settings(base, folder, lora=str(lora)))
    change_last_byte(lora)
    with pytest.raises(UserError, match=r"lora\.safetensors has changed since; name another out"):
        command.run(settings(base, tmp_path / "moved", lora=str(lora)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word": "green"}, "word 'green' is not in the prompt 'two red circles'; its words are"),
        ({"prompt": "a red dog"}, "the word 'dog' is unknown to this model"),
        ({"layer": 2}, "layer is 2; this model's joint attentions are 0..1"),
        ({"height": 50}, "50 x 40 pixels: both must be multiples of 4"),
        ({"lora": "nowhere.safetensors"}, "lora=nowhere.safetensors is not there"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    base, tmp_path, monkeypatch, changes, message
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Pipeline, "__call__", None)
    with pytest.raises(UserError, match=message):
        command.run(settings(base, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()  # nothing stands in the way of the next try


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " | "}, "prompt is empty; it must be what to draw"),
        ({"num_images": 0}, "num_images is 0; it must be 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"gammas": (1.0, 0.0)}, "gammas is 0.0; it must be numbers above 0"),
        ({"layer": -1}, "layer is -1; it must be 0 or more, or none"),
        ({"out": ""}, "out is empty; it must be the name of a folder"),
        ({"taca": None}, "attention compares plain with TACA; leave taca on"),
    ],
)
def test_settings_out_of_range(base, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        settings(base, tmp_path, **changes)


def test_without_matplotlib_one_line_says_what_to_install(base, tmp_path, monkeypatch):
    figures = "taca_jax.evaluation.attention_maps.figures"
    monkeypatch.delitem(sys.modules, figures, raising=False)
    monkeypatch.delattr(attention_maps, "figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="figures need Matplotlib: pip install matplotlib"):
        command.run(settings(base, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_no_captions_have_no_alignment():
    pipeline = tiny_pipeline()
    assert command._are_shapes(pipeline, [PROMPT])
    assert not command._are_shapes(pipeline, [PROMPT, "red circle"])


def test_the_variants():
    config = settings("base", "out", gammas=(1.3, 1.0, 1.3), lora="lora.safetensors")
    found = {each.name: each for each in command.variants(config)}
    assert list(found) == ["plain", "gamma 1.3", "gamma 1.5 + LoRA"]
    assert found["plain"].taca is None
    assert found["gamma 1.3"].taca == TacaConfig(gamma=1.3, threshold=800)
    assert [each.lora_strength for each in found.values()] == [0, 0, 1]
    assert found["gamma 1.5 + LoRA"].taca == TACA
    assert command._compared(config) == "gamma 1.3"


def test_gammas_are_drawn_without_the_knots_and_these_are_a_variant_of_their_own():
    learned = TacaConfig(threshold=800, knots=(1.1, 1.6))
    config = settings("base", "out", taca=learned, gammas=(1.0, 1.3), lora="lora.safetensors")
    found = {each.name: (each.taca, each.lora_strength) for each in command.variants(config)}
    assert found == {
        "plain": (None, 0.0),
        "gamma 1.3": (TacaConfig(gamma=1.3, threshold=800), 0.0),
        "gamma by 2 knots": (learned, 0.0),
        "gamma by 2 knots + LoRA": (learned, 1.0),
    }
    assert command._compared(config) == "gamma by 2 knots"


def test_of_a_rising_gamma_the_names_say_so():
    rising = TacaConfig(gamma=1.3, threshold=800, schedule="linear")
    config = settings("base", "out", taca=rising, gammas=(1.3, 1.5))
    names = [each.name for each in command.variants(config)]
    assert names == ["plain", "gamma up to 1.3 (linear)", "gamma up to 1.5 (linear)"]
    assert command._compared(config) == names[1]


def test_words_are_marked_among_the_text_tokens():
    prompt = "a red circle left of a blue square"
    marked = tokens_of_words(tiny_pipeline(), prompt, ["a", "blue square"], 2)
    assert marked.shape == (2, 2, TEXT_LENGTH)
    assert [np.flatnonzero(row).tolist() for row in marked[1]] == [[0, 5], [6, 7]]
