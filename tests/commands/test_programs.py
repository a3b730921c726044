"""The programs of the package: each explains itself, under the name by which it is called."""

import sys
from importlib import import_module

import pytest

from taca_jax.__main__ import main
from taca_jax.commands import PROGRAMS
from tests.processes import run_python

FIRST_WORDS = {
    "train": "--config NAME",
    "generate": "--config NAME",
    "page": "[--config NAME]",
    "convert": "",
    "eval": "",
}


def help_of(capsys, run, *arguments, **options) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments, **options)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_says_how_to_call_it(name, capsys, monkeypatch):
    program = import_module(PROGRAMS[name][0]).main
    monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/taca-{name}", "--help"])
    installed = help_of(capsys, program)
    assert installed.startswith(f"usage: taca-{name} {FIRST_WORDS[name]}")
    as_module = help_of(capsys, main, [name, "--help"])
    assert (
        as_module.split() == installed.replace(f"taca-{name}", f"python -m taca_jax {name}").split()
    )


def test_a_checkouts_programs_say_how_to_call_them(capsys, monkeypatch):
    for name in ("train", "generate"):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        said = help_of(capsys, import_module(name).main)
        assert said.startswith(f"usage: python {name}.py ")


def test_the_package_lists_its_programs(capsys):
    main([])
    said = capsys.readouterr().out
    for name, (_, purpose) in PROGRAMS.items():
        assert f"  {name} " in said
        assert purpose in said


def test_an_unknown_program_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown program trian; there are train, ")


def test_importing_the_package_is_quick():
    """No library is imported before it is needed, not even JAX."""
    words = "import sys, taca_jax; print(*sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    assert run_python("-c", words).stdout.strip() == ""


def test_as_a_module():
    done = run_python("-m", "taca_jax", "generate", "--config", "no_such_preset")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown preset no_such_preset; there are ")
    assert done.stderr.count("\n") == 1
