"""Presets of one's own, by path: a Python file or a saved configuration, or one line that says why
not."""

import dataclasses
from pathlib import Path

import pytest

from taca_jax import presets
from taca_jax.config.command_line import parse_cli
from taca_jax.config.json_text import to_json
from taca_jax.config.presets import RECORD
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.saved import saved_drawing
from taca_jax.taca import TacaConfig
from taca_jax.training import lora_files, record
from taca_jax.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
MINE = """
import dataclasses
from taca_jax.presets.shapes_taca import CONFIG as SHIPPED

CONFIG = dataclasses.replace(SHIPPED, name="mine", steps=7)
"""


def drawing(*words: str) -> GenerateConfig:
    return parse_cli(
        ["--config", *words], GenerateConfig, attribute="GENERATE", saved=saved_drawing
    )


def said(capsys, parse, *words) -> str:
    """The one line with which `parse` refuses the words."""
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def training(*words: str) -> TrainConfig:
    return parse_cli(["--config", *words], TrainConfig)


def test_the_presets_of_a_checkout_are_its_configs():
    assert presets.__path__[-1] == str(ROOT / "configs")


def test_a_file_of_ones_own_is_a_preset(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    config = training(str(tmp_path / "mine.py"), "lora.rank=4")
    assert config.lora is not None
    assert (config.name, config.steps, config.lora.rank) == ("mine", 7, 4)
    monkeypatch.chdir(tmp_path)
    assert training("mine.py").steps == 7
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CONFIG = (", "mine.py, line 1: '(' was never closed; it must be Python"),
        ("x = 1", "mine.py has no CONFIG; add CONFIG = TrainConfig(...)"),
        ("GENERATE = 1", "mine.py only draws; add CONFIG = TrainConfig(...)"),
        ("CONFIG = {}", "mine.py: CONFIG is of class dict; expected CONFIG = TrainConfig(...)"),
        ("\nCONFIG = TrainConfig()", "mine.py, line 2: NameError: name 'TrainConfig' is not"),
        ("import no_such_thing", "mine.py, line 1: ModuleNotFoundError: No module named 'no_such"),
        (
            MINE.replace("steps=7", "steps=0"),
            "mine.py, line 5: steps is 0; it must be 1 or more",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(capsys, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    assert message in said(capsys, training, str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.py", "no.py is not there; give FILE.py (yours), a run's folder or its config.json"),
        ("no.json", "no.json is not there; give"),
        ("a/folder", "a/folder is not there; give"),
        ("empty", "empty has no config.json, as a run's folder has"),
        ("text.txt", "unknown preset text.txt; there are"),
        ("./empty/text.txt", "empty/text.txt is no preset; give"),
        ("bad.json", "bad.json is not JSON"),
        ("list.json", "list.json: the whole is []; expected an object"),
        ("picture.json", "picture.json cannot be read"),
    ],
)
@pytest.mark.parametrize("parse", [training, drawing])
def test_a_path_without_a_preset_is_refused(capsys, tmp_path, monkeypatch, parse, name, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for file, text in {
        "text.txt": "",
        "empty/text.txt": "",
        "bad.json": "{",
        "list.json": "[]",
    }.items():
        Path(file).write_text(text)
    Path("picture.json").write_bytes(b"\x89PNG")
    assert message in said(capsys, parse, name)


SHAPES = training("shapes_taca")


def test_a_runs_record_is_called_as_it_is_looked_for():
    assert record.RECORD == RECORD


def saved(folder: Path, config: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(to_json(config))
    return str(folder)


def test_a_saved_run_trains_again(tmp_path):
    folder = saved(tmp_path / "run", dataclasses.replace(SHAPES, steps=9))
    assert training(folder) == training(f"{folder}/config.json")
    assert training(folder, "seed=4") == dataclasses.replace(SHAPES, steps=9, seed=4)


def test_a_saved_run_draws_with_what_it_made(capsys, tmp_path):
    taca = TacaConfig(gamma=1.4, threshold=800)
    folder = saved(tmp_path / "run", dataclasses.replace(SHAPES, taca=taca))
    no_lora = said(capsys, drawing, folder)
    assert "run/lora.safetensors is not there: the run has written no LoRA yet" in no_lora

    loras = tmp_path / "run" / lora_files.FOLDER
    loras.mkdir()
    for step in (100, 200):
        (loras / f"step-{step:06d}.safetensors").touch()
    newest = str(loras / "step-000200.safetensors")
    expected = GenerateConfig(base="shapes_base", lora=newest, taca=taca, dtype="float32")
    assert drawing(folder) == expected
    last = tmp_path / "run" / lora_files.FILE
    last.touch()
    expected = dataclasses.replace(expected, lora=str(last), prompt="a cat")
    assert drawing(f"{folder}/config.json", "prompt=a cat") == expected


def test_a_saved_run_draws_with_the_model_or_the_gamma_that_it_learnt(capsys, tmp_path):
    base = training("shapes_base")
    folder = saved(tmp_path / "base", base)
    assert "base/model is not there: the run has written no model" in said(capsys, drawing, folder)
    (tmp_path / "base/model").mkdir()
    assert drawing(folder).base == f"{folder}/model"
    assert drawing(folder).taca is None

    folder = saved(tmp_path / "gamma", dataclasses.replace(SHAPES, lora=None, gamma_knots=2))
    learnt = TacaConfig(threshold=835, knots=(1.3, 1.1))
    (tmp_path / "gamma/taca.json").write_text(to_json(learnt))
    assert drawing(folder).taca == learnt
    assert drawing(folder).lora is None


def test_a_saved_drawing_draws(tmp_path):
    config = GenerateConfig(base="mine", prompt="a dog", steps=3)
    assert drawing(saved(tmp_path / "drawn", config)) == config
