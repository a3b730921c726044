"""The commands of `python -m taca_jax.evaluation`: found, explained, refused."""

import dataclasses
from types import SimpleNamespace

import pytest

from configs import shapes_taca
from taca_jax.evaluation import commands
from taca_jax.evaluation.attention_maps.config import AttentionConfig
from taca_jax.evaluation.commands import COMMANDS, run
from taca_jax.pipelines.config import SamplingConfig
from tests.processes import run_python


def ended(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        run(words)
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_the_help_lists_every_command(capsys):
    for words in ((), ("--help",)):
        code, out, _ = ended(capsys, *words)
        assert code == 0
        for name, command in COMMANDS.items():
            assert f"  {name} " in out
            assert command.purpose in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_a_configuration_and_a_function(name, capsys):
    code, out, _ = ended(capsys, *name.split(), "--help")
    assert code == 0
    assert out.startswith(f"usage: taca-eval {name} ")
    config, function = (
        commands._named(each) for each in (COMMANDS[name].config, COMMANDS[name].run)
    )
    assert dataclasses.is_dataclass(config)
    assert callable(function)
    assert ("presets:" in out) == issubclass(config, SamplingConfig)


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


def test_a_base_will_do_in_place_of_a_preset(given, capsys):
    commands.run(["attention", "base=mine", "taca.gamma=1.5"])
    (config,) = given
    assert (config.base, config.lora, config.taca.gamma) == ("mine", None, 1.5)
    code, _, err = ended(capsys, "attention", "taca.gamma=1.5")
    assert code == 2
    assert err.startswith("error: no base=... and no --config NAME given; the presets are ")


def test_unknown_commands_are_refused_with_the_nearest(capsys):
    code, out, err = ended(capsys, "compbench", "scor")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown command compbench; there are compbench")
    code, _, err = ended(capsys, "compbench", "score")
    assert (code, err) == (2, "error: give pictures=...\n")


def test_what_a_user_can_mend_is_one_line_and_status_1(tmp_path):
    done = run_python("-m", "taca_jax.evaluation", "compbench", "report", f"runs={tmp_path}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path} has no folder of a category")
    assert done.stderr.count("\n") == 1
