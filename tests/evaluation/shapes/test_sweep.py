"""A sweep: its settings, what it draws and keeps, and its results."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from taca_jax.config.json_text import to_json
from taca_jax.errors import UserError
from taca_jax.evaluation.shapes import sweep as sweep_module
from taca_jax.evaluation.shapes.sweep import sweep
from taca_jax.evaluation.shapes.sweep_config import SweepConfig
from taca_jax.evaluation.sweeps import settings
from taca_jax.taca import TacaConfig
from taca_jax.weights.shipped import find_weights
from tests.evaluation.shapes.painter import Painter, grey, right
from tests.evaluation.weights import change_last_byte

TACA = TacaConfig(gamma=1.2, threshold=835)
OWN_GUIDANCE = 1.5


def config_for(**changes):
    usual = {"base": "shapes_base", "taca": TACA, "prompts": 1, "batch_size": 6}
    return SweepConfig(**(usual | changes))


def names(**changes):
    return [point.name for point in settings(config_for(**changes), OWN_GUIDANCE)]


def test_each_axis_changes_alone_around_the_center():
    assert names(gammas=(1.2, 1.5), thresholds=(700,), cond_only=(True,)) == [
        "base",
        "gamma 1.2, step, t >= 835, no LoRA",
        "gamma 1.5, step, t >= 835, no LoRA",
        "gamma 1.2, step, t >= 700, no LoRA",
        "gamma 1.2, step, t >= 835, conditional half, no LoRA",
    ]


def test_all_combines_them_and_draws_the_same_attention_once():
    found = names(
        vary="all",
        gammas=(1.0, 1.2),
        schedules=("step", "linear"),
        loras=("none", "a.safetensors"),
        guidances=(1.0, 3.0),
    )
    # Gamma 1 has no schedule, and without a LoRA it is the base.
    first = [
        "base, guidance 1",
        "gamma 1, t >= 835, LoRA a.safetensors, guidance 1",
        "gamma 1.2, step, t >= 835, no LoRA, guidance 1",
        "gamma 1.2, step, t >= 835, LoRA a.safetensors, guidance 1",
        "gamma 1.2, linear, t >= 835, no LoRA, guidance 1",
        "gamma 1.2, linear, t >= 835, LoRA a.safetensors, guidance 1",
    ]
    assert found == first + [name.replace("guidance 1", "guidance 3") for name in first]


def test_a_learned_gamma_is_one_more_setting(tmp_path):
    file = tmp_path / "taca.json"
    file.write_text(to_json(TacaConfig(threshold=800, knots=(1.1, 1.4))))
    assert names(gammas_learned=(str(file),))[2:] == ["gamma 1.1 1.4, t >= 800, no LoRA"]
    with pytest.raises(UserError, match=r"taca\.json cannot be read .*; train with gamma_knots"):
        names(gammas_learned=(str(tmp_path / "absent" / "taca.json"),))


def test_gammas_and_schedules_are_without_the_knots_of_the_center():
    knots = TacaConfig(threshold=800, knots=(1.1, 1.4))
    axes = {"taca": knots, "gammas": (1.3,), "schedules": ("linear",)}
    assert names(**axes, thresholds=(700,))[1:] == [
        "gamma 1.1 1.4, t >= 800, no LoRA",
        "gamma 1.3, step, t >= 800, no LoRA",
        "gamma 1.1 1.4, t >= 700, no LoRA",
        "gamma 1.2, linear, t >= 800, no LoRA",
    ]
    assert names(**axes, vary="all")[1:] == ["gamma 1.3, linear, t >= 800, no LoRA"]
    assert names(taca=knots, thresholds=(700,), vary="all")[1:] == [
        "gamma 1.1 1.4, t >= 700, no LoRA"
    ]


@pytest.mark.parametrize("own", [1.0, 2.0])
def test_without_an_unconditional_half_cond_only_is_drawn_once(own):
    config = config_for(vary="all", cond_only=(False, True), guidances=(1.0, 3.0))
    assert [point.taca.cond_only for point in settings(config, own) if point.taca] == [
        False,
        False,
        True,
    ]
    center = settings(config_for(cond_only=(False, True)), own)
    assert len(center) == (2 if own <= 1 else 3)


def test_first_steps_have_no_threshold_and_no_schedule():
    first = TacaConfig(first_steps=3, schedule="linear")
    assert names(taca=first, gammas=(1.5,))[1:] == [
        "gamma 1.2, first 3 steps, no LoRA",
        "gamma 1.5, first 3 steps, no LoRA",
    ]
    for axis in ({"thresholds": (700.0,)}, {"schedules": ("linear",)}):
        with pytest.raises(UserError, match=r"does nothing with taca\.first_steps=3; leave one of"):
            config_for(taca=first, **axis)


@pytest.mark.parametrize("vary", ["each", "all"])
@pytest.mark.parametrize(
    "taca",
    [TACA, replace(TACA, knots=(1.1, 1.4)), replace(TACA, gamma=1.0, schedule="cosine")],
)
def test_settings_that_differ_have_names_that_differ(tmp_path, vary, taca):
    learned = []
    for number, knots in enumerate([(1.1, 1.4), (1.1, 1.4000001)]):
        learned.append(tmp_path / f"{number}.json")
        learned[-1].write_text(to_json(TacaConfig(threshold=800, gamma=1 + number, knots=knots)))
    found = names(
        taca=taca,
        vary=vary,
        gammas=(1.0, 1.2, 1.2000001),
        thresholds=(800.0, 800.0001),
        schedules=("step", "sigmoid"),
        cond_only=(False, True),
        loras=("none", "a", "b"),
        gammas_learned=tuple(map(str, learned)),
        guidances=(1.0, 2.0, 2.0000001),
    )
    assert len(set(found)) == len(found) >= 10


class Sketcher(Painter):
    """Draws rightly where gamma is above 1.2, or with the LoRA, and nothing otherwise."""

    lora = None

    def __init__(self):
        super().__init__(self.sketch)

    def sketch(self, prompt, options):
        taca = options["taca"]
        strong = taca is not None and (taca.gamma > 1.2 or options["lora_strength"] > 0)
        return (right if strong else grey)(prompt, options)

    def load_lora(self, path):
        self.lora = path

    def unload_lora(self):
        self.lora = None


def test_results_are_paired_with_the_base_and_a_longer_sweep_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    painter = Sketcher()
    monkeypatch.setattr(sweep_module, "load_pipeline", lambda *_: painter)
    out = tmp_path / "out"
    sweep(config_for(out=str(out), gammas=(1.5,)))
    assert len(painter.calls) == 2 * 3  # a batch of each half, for base, center and gamma 1.5
    sweep(config_for(out=str(out), gammas=(1.5,), loras=("shapes_taca.safetensors",)))
    assert len(painter.calls) == 2 * 4
    assert painter.lora == "shapes_taca.safetensors"
    rows = {row["name"]: row for row in json.loads((out / "sweep.json").read_text())}
    rights = {name: row["seen"]["correct"]["all"]["value"] for name, row in rows.items()}
    assert rights == {
        "base": 0,
        "gamma 1.2, step, t >= 835, no LoRA": 0,
        "gamma 1.5, step, t >= 835, no LoRA": 1,
        "gamma 1.2, step, t >= 835, LoRA shapes_taca.safetensors": 1,
    }
    strong = rows["gamma 1.5, step, t >= 835, no LoRA"]
    assert strong["held-out"]["difference"]["exact"]["value"] == 1
    assert strong["taca"]["gamma"] == 1.5
    printed = capsys.readouterr().out
    assert "4 settings, 12 pictures each" in printed
    for half in ("Seen", "Held-out"):
        assert f"{half} compositions drawn right, %, and points from the base" in printed
    assert "+100.0 (" in printed
    assert "p = 0.031" in printed
    said = " ".join(printed.split())
    assert "p-values are of each setting alone, not corrected for their number" in said
    lines = [line for line in printed.splitlines() if not line.startswith("wrote ")]
    assert max(map(len, lines)) <= 80
    with Image.open(out / "sweep.png") as figure:
        assert figure.width > 1000
    with pytest.raises(UserError, match="seed is 0 there, 5 here; name another out"):
        sweep(config_for(out=str(out), seed=5))


def test_a_lora_that_was_trained_anew_is_drawn_anew_and_nothing_else(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    painter, lora = Sketcher(), tmp_path / "lora.safetensors"
    monkeypatch.setattr(sweep_module, "load_pipeline", lambda *_: painter)
    shutil.copy(find_weights("shapes_taca.safetensors"), lora)
    config = config_for(out=str(tmp_path / "out"), lora=str(lora))
    sweep(config)
    assert len(painter.calls) == 2 * 2
    change_last_byte(lora)
    sweep(config)
    assert len(painter.calls) == 2 * 3
    assert [options["lora_strength"] for _, options in painter.calls[4:]] == [1, 1]
    shutil.move(tmp_path / "out", tmp_path / "moved")
    sweep(config_for(out=str(tmp_path / "moved"), lora=str(lora.rename(tmp_path / "other"))))
    assert len(painter.calls) == 2 * 3


def test_a_lora_of_another_model_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    painter, out = Sketcher(), tmp_path / "out"
    monkeypatch.setattr(sweep_module, "load_pipeline", lambda *_: painter)
    other = tmp_path / "other.safetensors"
    shutil.copy(find_weights("shapes_taca.safetensors"), other)

    def load_lora(path):
        if path == str(other):
            raise UserError("of another model")

    monkeypatch.setattr(painter, "load_lora", load_lora)
    with pytest.raises(UserError, match="of another model"):
        sweep(config_for(out=str(out), loras=("shapes_taca.safetensors", str(other)), seed=1))
    assert painter.calls == []
    sweep(config_for(out=str(out), loras=("shapes_taca.safetensors",)))  # nothing is in the way
    assert len(painter.calls) == 2 * 3


def test_mistakes_are_refused_before_the_model_loads(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    loads = "taca_jax.evaluation.shapes.sweep.load_pipeline"
    monkeypatch.setattr(loads, lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="lora=absent is not there"):
        sweep(config_for(out=str(tmp_path / "out"), loras=("absent",)))
    with pytest.raises(UserError, match="taca is none; it must be the center"):
        config_for(taca=None)
    assert not (tmp_path / "out").exists()
