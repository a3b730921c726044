"""The command line: a preset changed field by field, or one line on stderr and status 2."""

import sys
from dataclasses import dataclass, field

import pytest

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import UserError
from taca_jax.pipelines.config import GenerateConfig


@dataclass(frozen=True)
class Adapter:
    """rank: of the factors."""

    rank: int = 16

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"adapter.rank is {self.rank}; it must be 1 or more")


@dataclass(frozen=True)
class Run:
    """One run.

    steps: how long.
    """

    steps: int
    adapter: Adapter | None = field(default_factory=Adapter)
    resume: bool = False


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """The name of a package with the presets `base`, `taca` (Run) and `draw` (another kind)."""
    package = tmp_path / "presets_for_test"
    package.mkdir()
    (package / "__init__.py").touch()
    runs = f"from {__name__} import Run\n"
    (package / "base.py").write_text(runs + "CONFIG = Run(steps=10, adapter=None)\n")
    (package / "taca.py").write_text(runs + "CONFIG = Run(steps=20)\n")
    (package / "draw.py").write_text(f"from {__name__} import Adapter\nDRAW = Adapter(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield package.name
    for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        del sys.modules[name]


def test_a_preset_is_changed_field_by_field(presets):
    command = ["--config", "taca", "adapter.rank=64", "resume=true"]
    assert parse_cli(command, Run, package=presets) == Run(20, Adapter(64), resume=True)
    assert parse_cli(["--config=base"], Run, package=presets) == Run(10, None)
    assert parse_cli(["steps=3", "--config", "base"], Run, package=presets).steps == 3
    assert parse_cli(["--config", "base", "adapter.rank=2"], Run, package=presets).adapter == (
        Adapter(2)
    )
    assert parse_cli(["--config", "taca", "adapter=none"], Run, package=presets).adapter is None


def test_another_kind_of_preset_stands_under_another_name(presets):
    drawn = parse_cli(["--config", "draw"], Adapter, package=presets, attribute="DRAW")
    assert drawn == Adapter(3)


@dataclass(frozen=True)
class Drawing:
    """What is drawn.

    prompt: words. seed: of the noise. size: of the picture.
    """

    prompt: str
    seed: int = 0
    size: int = 8


@dataclass(frozen=True)
class Series(Drawing):
    """Several drawings."""

    seed: int = 42
    count: int = 2


def test_of_another_kind_of_preset_what_it_sets_is_taken(presets, tmp_path):
    text = f"from {__name__} import Drawing\nDRAW = Drawing('a cat', size=16)\n"
    (tmp_path / presets / "cat.py").write_text(text)
    options = {"package": presets, "attribute": "DRAW", "preset_kind": Drawing}
    # The preset leaves the seed at its class's default; a Series has another one.
    assert parse_cli(["--config", "cat"], Series, **options) == Series("a cat", 42, 16, 2)
    assert parse_cli(["--config", "cat", "seed=0"], Series, **options).seed == 0
    assert parse_cli(["--config", "cat"], Drawing, **options) == Drawing("a cat", 0, 16)


def test_a_preset_of_another_kind_need_not_be_given(presets, capsys):
    options = {"package": presets, "attribute": "DRAW", "preset_kind": Drawing}
    assert parse_cli(["prompt=a dog", "count=3"], Series, **options) == Series("a dog", 42, 8, 3)
    with pytest.raises(SystemExit) as stop:
        parse_cli(["count=3"], Series, **options)
    assert stop.value.code == 2
    said = "error: no prompt=... and no --config NAME given; the presets are "
    assert capsys.readouterr().err.startswith(said)


@dataclass(frozen=True)
class Exhibition(Drawing):
    """A relative of Series; what both call `count` is not the same.

    count: of rooms.
    """

    count: int = 1


def test_only_what_two_kinds_inherit_is_taken(presets, tmp_path):
    text = f"from {__name__} import Exhibition\nDRAW = Exhibition('a cat', count=9)\n"
    (tmp_path / presets / "rooms.py").write_text(text)
    options = {"package": presets, "attribute": "DRAW", "preset_kind": Exhibition}
    assert parse_cli(["--config", "rooms"], Series, **options) == Series("a cat", 42, 8, 2)


def test_a_command_without_presets(capsys):
    given = parse_cli(["prompt=a cat", "size=16"], Drawing, attribute=None)
    assert given == Drawing("a cat", 0, 16)
    for words, message in {
        "": "give prompt=...",
        "prompt=a --config x": "--config: this command has no presets; write key=value",
        "promt=a": "unknown key promt; did you mean prompt?",
    }.items():
        with pytest.raises(SystemExit) as stop:
            parse_cli(words.split(), Drawing, attribute=None)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(SystemExit) as stop:
        parse_cli(["--help"], Drawing, attribute=None, program="python -m drawing")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m drawing key=value ...\n\nkeys (default values):\n")
    assert "prompt=... (required)  [text]" in said


def test_a_preset_of_another_program_is_said_to_be_one(capsys):
    for attribute, preset, said in (
        (
            "GENERATE",
            "pictures_base",
            "the preset pictures_base only trains; there are shapes",
        ),
        ("GENERATE", "pictures_bas", "unknown preset pictures_bas; there are"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse_cli(["--config", preset], GenerateConfig, attribute=attribute)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "no --config NAME given; the presets are base, taca"),
        ("--config tcaa", "unknown preset tcaa; there are taca, base"),
        ("--config draw", "unknown preset draw; there are"),
        ("--config taca adapter.rnk=1", "unknown key adapter.rnk; did you mean adapter.rank?"),
        ("--config taca adapter.rank=abc", "adapter.rank=abc: expected an integer"),
        ("--config taca adapter.rank=-3", "adapter.rank is -3; it must be 1 or more"),
        ("--config taca adapter=big", "adapter is a group; set one of adapter.rank"),
        ("--config taca steps", "steps: expected key=value; write steps=VALUE"),
        ("--config taca --steps 3", "--steps: expected key=value; write steps=VALUE"),
        ("--config taca --steps=3", "--steps=3: keys have no dashes; write steps=3"),
        ("--config taca steps=1 steps=2", "steps is given twice (1 and 2)"),
        ("--config taca resume=maybe", "resume=maybe: expected true or false"),
        ("--config taca steps=", "steps=: expected an integer"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(presets, capsys, command, message):
    with pytest.raises(SystemExit) as stop:
        parse_cli(command.split(), Run, package=presets)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


def test_config_without_a_name_lists_the_presets(presets, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(["--config"], Run, package=presets)
    assert stop.value.code == 0
    assert capsys.readouterr().out.split() == ["base", "taca"]


def test_help_lists_presets_keys_values_types_and_words(presets, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(["--config", "taca", "--help"], Run, package=presets)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ["presets: base, taca", "steps=20  [an integer]", "how long.", "adapter.rank=16"]:
        assert words in out
    with pytest.raises(SystemExit):
        parse_cli(["--help"], Run, package=presets)
    assert "steps=... (required)" in capsys.readouterr().out
