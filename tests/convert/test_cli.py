"""The command line of `python -m convert`: one line for each mistake, and what to write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taca_jax.convert.cli import main, parse
from taca_jax.families.registry import families
from tests.processes import ROOT

COMMANDS = ("t5", "clip", "vae", "tiny_vae", "lora", "export", "inspect", "verify")


def parsed(line: str):
    """What a command line is read as: keywords of what it runs."""
    return parse(line.split()).keywords


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no command given; there are flux, sd3, flux2, t5"),
        ("fulx", "unknown command fulx; there are flux"),
        ("--src a flux", "unknown command --src; there are "),
        ("flux --dts x", "unknown option of flux: --dts; did you mean --dst?"),
        ("flux --sr a --dst b", "unknown option of flux: --sr; did you mean --src?"),
        ("flux --src a", "flux: the following arguments are required: --dst"),
        ("flux --src a --dst", "flux: argument --dst: expected one argument"),
        ("flux --src a --src=b", "--src is given twice"),
        ("flux --src a --dst b c", "flux has no use for c; options are written --name VALUE"),
        ("flux --src a --dst b -x", "flux has no use for -x; options are written --name VALUE"),
        ("flux --src a --dst b --dtype int4", "flux: argument --dtype: invalid choice: 'int4'"),
        ("flux --src a --dst b --axes-dim 8 8", "--axes-dim 8 8: expected a comma list of 3"),
        ("flux --src a --dst b --num-heads 8", "unknown option of flux: --num-heads"),
        ("clip --src a --dst b --num-heads x", "clip: argument --num-heads: invalid int value"),
        ("inspect", "inspect: the following arguments are required: PATH"),
        ("inspect a b", "inspect has no use for b"),
        ("lora --src a --dst b --to pfet", "lora: argument --to: invalid choice: 'pfet' (choose"),
        ("export --src a --dst b --shard-gb x", "export: argument --shard-gb: invalid float value"),
    ],
)
def test_mistakes(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1


def test_options():
    assert parsed("inspect a-b") == {"path": Path("a-b")}
    given = parsed("flux --src a --dst b --axes-dim 16 56 56 --dtype float16")
    assert given == {
        "src": Path("a"),
        "dst": Path("b"),
        "axes_dim": (16, 56, 56),
        "dtype": "float16",
        "tokenizers": None,
    }
    assert parsed("flux --src=a --dst=b --axes_dim=16,56,56 --dtype=float16") == given
    assert parsed("flux --src a --dst b")["dtype"] is None
    assert parsed("export --src a --dst b --shard_gb 1e-3")["shard_gb"] == 1e-3


def test_help_names_commands_and_options(capsys):
    commands = (*(family.name for family in families()), *COMMANDS)
    for line, words in (("--help", commands), ("flux --help", ("--axes-dim", "Rotary channels"))):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words)


def test_as_a_program(tmp_path):
    """One line on stderr, status 1, no traceback."""
    words = ["vae", "--src", str(tmp_path / "no"), "--dst", str(tmp_path / "dst")]
    done = subprocess.run(
        [sys.executable, "-m", "convert", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_who_leaves_is_no_error(tmp_path):
    """As `inspect X | head` does; every program says its lines so."""
    program = "from taca_jax.config.command_line import say\nsay(['line'] * 100_000)"
    read, write = os.pipe()
    words = [sys.executable, "-c", program]
    process = subprocess.Popen(words, stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(read)
    os.close(write)
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == 0
