"""Runs in Weights & Biases: what is logged there, and that a run goes on there; with a stand-in for
the package."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from taca_jax.errors import UserError
from taca_jax.training import wandb_log
from taca_jax.training.config import ValidationConfig
from taca_jax.training.models import RunModels
from taca_jax.training.run import train
from taca_jax.training.validation import LOSS
from tests.training.tiny import lora_changes, tiny_config, tiny_pipeline


class Error(Exception):
    """What wandb raises."""


class Wandb(SimpleNamespace):
    """Keeps what it is told, by the id of the run."""

    def __init__(self):
        super().__init__(Error=Error, Image=lambda picture: picture.shape, refuses=False)
        self.starts, self.logged, self.ends, self.axes = [], {}, [], []

    def init(self, **settings):
        if self.refuses:
            raise Error("api_key not configured (no-tty)\nand more")
        self.starts.append(settings)
        run = self.logged.setdefault(settings["id"], [])
        return SimpleNamespace(
            log=run.append,
            define_metric=lambda name, step_metric=None: self.axes.append((name, step_metric)),
            finish=lambda exit_code: self.ends.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(wandb_log, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_pipeline().save(folder)
    return str(folder)


def test_numbers_and_samples_are_logged_and_a_resumed_run_goes_on(base, tmp_path, wandb):
    config = tiny_config(
        tmp_path,
        **lora_changes(base),
        steps=2,
        wandb=True,
        validation=ValidationConfig(every=2, pictures=2, timesteps=1),
        sample_every=2,
        sample_prompts=("a red circle",),
        sample_steps=1,
    )
    train(config)
    train(dataclasses.replace(config, resume=True, steps=3))
    first, again = wandb.starts
    assert first["id"] == again["id"]
    assert (first["project"], first["name"], first["resume"]) == ("taca_jax", "tiny", "allow")
    assert first["config"]["lora"]["rank"] == 2
    assert (first["config"]["steps"], again["config"]["steps"]) == (2, 3)
    assert wandb.axes == [("step", None), ("*", "step")] * 2
    assert wandb.ends == [0, 0]
    (logged,) = wandb.logged.values()
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in logged if LOSS in line] == [0, 2, 3]
    pictures = {line["step"]: line["samples"] for line in logged if "samples" in line}
    assert list(pictures) == [0, 2]
    assert all(shape[-1] == 3 for shape in pictures.values())


def test_a_run_that_cannot_start_there_says_what_to_do(tmp_path, wandb):
    wandb.refuses = True
    with pytest.raises(UserError, match=r"cannot start \(api_key not configured \(no-tty\)\); log"):
        wandb_log.WandbRun(tiny_config(tmp_path, wandb=True))
    assert not (tmp_path / wandb_log.ID_FILE).exists()


def test_without_the_package_nothing_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "find_spec", lambda name: None)
    monkeypatch.setattr(RunModels, "load_transformer", None)
    config = tiny_config(tmp_path, **lora_changes(base), wandb=True)
    with pytest.raises(UserError, match=r'wandb=true needs .*: pip install -e "\.\[wandb\]", or'):
        train(config)
    assert not (tmp_path / "config.json").exists()
