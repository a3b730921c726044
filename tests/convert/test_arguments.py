"""The command line of `python -m convert`: one line for each mistake, and what to write."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from convert.arguments import POSITIONAL, parse

from convert.cli import COMMANDS, Flux, Inspect, main
from tests.processes import ROOT


def parsed(line: str):
    return parse(line.split(), COMMANDS, prog="convert", about="")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no command given; there are flux, sd3, t5"),
        ("fulx", "unknown command fulx; there are flux"),
        ("flux --dts x", "unknown option of flux: --dts; did you mean --dst?"),
        ("flux --src a", "flux needs --dst"),
        ("flux --src a --dst", "--dst: expected a path"),
        ("flux --src a --src=b", "--src is given twice"),
        ("flux a", "flux has no use for a; options are written --name VALUE"),
        ("flux --src a --dst b --dtype int4", "--dtype int4: expected one of float32, bfloat16"),
        ("flux --src a --dst b --axes-dim 8 8", "--axes-dim 8 8: expected a comma list of 3"),
        ("inspect", "inspect needs PATH"),
        ("inspect a b", "inspect has no use for b"),
        ("lora --src a --dst b --to pfet", "--to pfet: expected one of peft, kohya, native"),
        ("export --src a --dst b --shard-gb x", "--shard-gb x: expected a number"),
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
    assert str(parsed("inspect a-b").path) == "a-b"
    assert isinstance(parsed("inspect a"), Inspect)
    expected = parsed("flux --src a --dst b --axes-dim 16 56 56 --dtype float16")
    assert isinstance(expected, Flux)
    assert (expected.axes_dim, expected.dtype) == ((16, 56, 56), "float16")
    assert parsed("flux --src=a --dst=b --axes_dim=16,56,56 --dtype=float16") == expected
    assert parsed("flux --src a --dst b --dtype none").dtype is None


def test_help_names_commands_and_options(capsys):
    for line, words in (("--help", COMMANDS), ("flux --help", ("--axes-dim", "Rotary channels"))):
        with pytest.raises(SystemExit) as stop:
            parsed(line)
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words)


@dataclass
class _Base:
    """What commands share."""

    source: Path = field(metadata=POSITIONAL)
    """Where 100 % of it
    comes from."""


@dataclass
class _Resize(_Base):
    """Makes it smaller.

    Or larger.
    """

    kind: Literal["near", "far"] = "near"
    """How."""
    tile_sizes: tuple[int, ...] | None = None
    undocumented: float = 0.5


def resized(*words: str):
    return parse(["resize", *words], {"resize": _Resize}, prog="tool", about="A tool.")


def test_fields_of_every_kind_are_read():
    assert resized("a") == _Resize(Path("a"))
    words = ["--kind", "far", "--tile-sizes", "1", "-2", "--undocumented=-1e3"]
    assert resized("a", *words) == _Resize(Path("a"), "far", (1, -2), -1000.0)
    assert resized("--tile_sizes", "none", "--kind=far", "a").tile_sizes is None


def test_help_is_made_of_docstrings_and_types(capsys):
    with pytest.raises(SystemExit):
        resized("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("usage: tool resize [-h]")
    for words in (
        "Makes it smaller. Or larger.",
        "SOURCE Where 100 % of it comes from.",
        "--kind {near,far} How. (default: near)",
        "--tile-sizes TILE_SIZES [TILE_SIZES ...]",
        "--undocumented UNDOCUMENTED (default: 0.5)",
    ):
        assert words in said
    with pytest.raises(SystemExit):
        parse(["-h"], {"resize": _Resize}, prog="tool", about="A tool.")
    said = " ".join(capsys.readouterr().out.split())
    assert "A tool." in said
    assert "resize Makes it smaller." in said
    assert "Or larger" not in said


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
