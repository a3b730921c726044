"""The evaluation at the end of a run, and the command: what they draw, write and refuse."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.evaluation.commands import run
from taca_jax.evaluation.shapes import evaluate
from taca_jax.evaluation.shapes.config import EvalConfig, ShapesConfig
from taca_jax.evaluation.shapes.evaluate import evaluate_command, evaluate_shapes
from taca_jax.evaluation.shapes.halves import make_halves
from taca_jax.evaluation.shapes.sampler import PICTURES
from taca_jax.pipelines.config import Variant
from taca_jax.taca import TacaConfig
from taca_jax.weights.shipped import find_weights
from tests.evaluation.shapes.painter import Painter, grey, right
from tests.evaluation.weights import change_last_byte
from tests.processes import run_python

TACA = TacaConfig(gamma=1.3, threshold=900)
SMALL = EvalConfig(prompts=2, steps=1, batch_size=5)


def only_at_two(prompt, options):
    return (right if options["guidance"] == 2 else grey)(prompt, options)


def test_results_are_written_and_printed(tmp_path, capsys):
    best = evaluate_shapes(Painter(right), SMALL, tmp_path, taca=TACA, lora=True)
    assert best is None
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(rows) == ["seen", "held-out"]
    for half in rows.values():
        assert list(half) == ["base", "base + TACA", "TACA + LoRA", "LoRA alone"]
        assert half["TACA + LoRA"]["correct"]["all"]["value"] == 1.0
        assert half["base"]["guidance"] == Painter.settings.guidance
    assert (tmp_path / "evaluation.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "Seen compositions drawn right" in printed
    assert "Held-out compositions drawn right" in printed
    assert "100.0" in printed


@pytest.mark.parametrize(("trained", "used"), [(TACA, TACA), (None, TacaConfig())])
def test_a_lora_is_measured_with_the_taca_of_its_training(tmp_path, trained, used):
    painter = Painter(grey)
    evaluate_shapes(painter, SMALL, tmp_path, taca=trained, lora=True)
    assert used in [options["taca"] for _, options in painter.calls]


def test_a_base_is_measured_at_each_guidance_and_the_best_is_returned(tmp_path, capsys):
    painter = Painter(only_at_two)
    asked = EvalConfig(prompts=1, guidances=(1.0, 2.0, 3.0), batch_size=6)
    assert evaluate_shapes(painter, asked, tmp_path, taca=None, lora=False) == 2.0
    assert {options["taca"] for _, options in painter.calls} == {None}
    printed = capsys.readouterr().out
    assert "best on seen compositions: guidance 2; the model's own is 1.5" in printed
    rows = json.loads((tmp_path / "evaluation.json").read_text())["seen"]
    assert [row["guidance"] for row in rows.values()] == [1.0, 2.0, 3.0]


@pytest.fixture
def painter(monkeypatch):
    """What the command loads."""
    painter = Painter(only_at_two)
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_: painter)
    return painter


def config_for(out, **changes):
    usual = {"base": "shapes_base", "taca": None, "prompts": 2, "batch_size": 12, "out": str(out)}
    return ShapesConfig(**(usual | changes))


def test_the_command_compares_strengths_of_guidance(tmp_path, painter, capsys):
    config = config_for(tmp_path / "out", guidances=(1.0, 2.0), num_images=2, seed=40)
    evaluate_command(config)
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for half in rows.values():
        assert [row["correct"]["all"]["value"] for row in half.values()] == [0.0, 1.0]
        assert half["guidance 2"]["correct"]["all"]["total"] == 24
    assert painter.calls[0][1]["seed"] == 40
    printed = capsys.readouterr().out
    assert "best on seen compositions: guidance 2" in printed
    assert "Seen prompts drawn best: pictures exact of 2" in printed
    assert "40 to 41" in printed
    with Image.open(tmp_path / "out" / "evaluation.png") as grid:
        assert grid.width > 2 * 520


def test_the_command_goes_on_where_it_was_and_with_nothing_else(tmp_path, painter, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(find_weights("shapes_base"), base)
    config = config_for(tmp_path / "out", base=str(base))
    real, calls = evaluate.Sampler._sample, []

    def interrupted(sampler, *arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(sampler, *arguments)

    monkeypatch.setattr(evaluate.Sampler, "_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_command(config)
    evaluate_command(config)
    assert len(calls) == 3  # one of each half, and the interrupted one
    with pytest.raises(UserError, match="seed is 0 there, 1 here; name another out"):
        evaluate_command(config_for(tmp_path / "out", base=str(base), seed=1))
    weights = base / "transformer" / "model.safetensors"
    weights.touch()
    shutil.move(tmp_path / "out", tmp_path / "moved")
    evaluate_command(config_for(tmp_path / "moved", base=str(base)))
    assert len(calls) == 3
    change_last_byte(weights)
    with pytest.raises(UserError, match=r"model\.safetensors has changed since; name another out"):
        evaluate_command(config_for(tmp_path / "moved", base=str(base)))
    with pytest.raises(UserError, match="holds something else; name another out"):
        evaluate_command(config_for(base))


def test_a_failed_start_does_not_block_the_corrected_command(tmp_path, painter, monkeypatch):
    out = tmp_path / "out"

    def failing(*_):
        raise UserError("no room for it")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_pipeline", failing)
        with pytest.raises(UserError, match="no room for it"):
            evaluate_command(config_for(out, seed=1))
    evaluate_command(config_for(out, seed=2))
    assert (out / "evaluation.json").is_file()


def test_every_variant_is_kept_under_its_own_short_name(tmp_path):
    half = make_halves(1)[0]
    taca = TacaConfig(knots=tuple(1 + i / 1000 for i in range(100)))
    ways = [
        Variant("base", None, 0.0, guidance=2.0),
        Variant("base", None, 0.0, guidance=2.0 + 1e-9),  # the same in "{:g}"
        Variant("knots" * 100, taca, 0.0),
        Variant("knots" * 100, taca, 1.0),
    ]
    painter = Painter(grey)
    for lora in ("first", "second", "first"):
        sampler = evaluate.Sampler(painter, 6, kept=tmp_path, lora=lora)
        for way in ways:
            sampler.draw(half, way)
    # Only what the LoRA takes part in is drawn with another one.
    assert len(painter.calls) == len(list(tmp_path.iterdir())) == len(ways) + 1
    for file in tmp_path.iterdir():
        assert len(file.name.encode()) < 64


def test_two_devices_draw_the_pictures_of_one(tmp_path):
    found = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        values = "base=shapes_base taca=none dtype=float32 steps=2 prompts=1 batch_size=6"
        command = ("-m", "taca_jax.evaluation", "shapes", *values.split(), f"out={out}")
        done = run_python(*command, devices=devices)
        assert done.returncode == 0, done.stderr[-3000:]
        files = sorted((out / PICTURES).rglob("*.png"))
        found.append([np.asarray(Image.open(file), int) for file in files])
    assert len(found[0]) == len(found[1]) == 2
    for one, two in zip(*found, strict=True):
        assert one.std() > 10
        assert np.abs(one - two).max() <= 1


def test_the_baseline_needs_no_lora(tmp_path, painter):
    for lora in ("not_yet_trained.safetensors@taca", "shapes_taca.safetensors"):
        evaluate_command(config_for(tmp_path / lora, taca=None, lora=lora, prompts=1))
    assert {options["lora_strength"] for _, options in painter.calls} == {0.0}


def test_a_lora_that_is_always_on_is_measured_without_taca(tmp_path, painter):
    lora = "shapes_taca.safetensors@always:0.5"
    evaluate_command(config_for(tmp_path / "out", taca=None, lora=lora, prompts=1))
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["seen"]
    assert list(rows) == ["base", "base + LoRA"]
    assert {options["lora_strength"] for _, options in painter.calls} == {0.0, 1.0}


def test_what_is_missing_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    loads = "taca_jax.evaluation.shapes.evaluate.load_pipeline"
    monkeypatch.setattr(loads, lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="nowhere is not there; give base="):
        evaluate_command(config_for(tmp_path / "out", base="nowhere"))
    with pytest.raises(UserError, match=r"lora=no\.safetensors is not there"):
        evaluate_command(config_for(tmp_path / "out", taca=TACA, lora="no.safetensors"))
    with pytest.raises(UserError, match="would have 64 pixels a side, and shapes are read at 40"):
        evaluate_command(config_for(tmp_path / "out", width=64))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out cannot be written to: .*file is a file"):
        evaluate_command(config_for(tmp_path / "file" / "out"))


def test_the_command_line_takes_the_preset_of_generate(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(evaluate, "evaluate_command", asked.append)
    run(["shapes", "--config", "shapes_taca", "taca=none", "guidances=1,2.5", "num_images=8"])
    [config] = asked
    assert (config.base, config.lora) == ("shapes_base", "shapes_taca.safetensors")
    assert (config.taca, config.guidances, config.num_images) == (None, (1.0, 2.5), 8)
