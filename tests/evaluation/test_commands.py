"""The command line of the evaluation: its commands, and the presets that they take."""

import re
from types import SimpleNamespace

import pytest

from configs import shapes_taca
from taca_jax.evaluation import commands
from taca_jax.evaluation.attention_maps.config import AttentionConfig


@pytest.fixture
def given(monkeypatch):
    """The configurations with which `attention` is run, in place of its running."""
    seen, named = [], commands._named
    stand_in = SimpleNamespace(run=seen.append)

    def name(what):
        return stand_in.run if what.endswith(":run") else named(what)

    monkeypatch.setattr(commands, "_named", name)
    return seen


def test_a_command_takes_what_a_preset_of_generate_sets(given):
    commands.run(["attention", "--config", "shapes_taca", "gammas=1,1.5", "taca.gamma=1.5"])
    (config,) = given
    preset = shapes_taca.GENERATE
    assert (config.base, config.lora, config.dtype) == (preset.base, preset.lora, preset.dtype)
    assert (config.taca.gamma, config.taca.threshold) == (1.5, preset.taca.threshold)
    assert config.gammas == (1.0, 1.5)
    own = AttentionConfig(base="any")  # its defaults stay, where generate.py has others
    assert (config.prompt, config.num_images, config.out) == (own.prompt, own.num_images, own.out)
    assert preset.prompt != own.prompt
    assert preset.out != own.out


def test_every_command_exists_and_is_listed(capsys):
    for name, command in commands.COMMANDS.items():
        assert commands._named(command.config)
        assert callable(commands._named(command.run))
        with pytest.raises(SystemExit) as end:
            commands.run(["--help"])
        assert end.value.code == 0
        line = rf"^  {name} +{re.escape(command.purpose)}$"
        assert re.search(line, capsys.readouterr().out, re.MULTILINE)


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        commands.run(["attentoin", "--config", "shapes_taca"])
    assert end.value.code == 2
    assert "error: unknown command attentoin; there are attention" in capsys.readouterr().err
