"""Bars: lines where there is no terminal, and nothing about what is quick."""

import io
import re

import pytest
from rich.console import Console

from taca_jax.telling import bars
from taca_jax.telling.bars import bar, period, shown


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: its seconds are clock[0]."""
    now = [100.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def test_off_a_terminal_there_is_a_line_every_half_minute_and_one_at_the_end(clock, capsys):
    with bar("loading the transformer", 24_000_000_000, "bytes") as advance:
        for _ in range(6):
            clock[0] += 10
            advance(4_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "loading the transformer: 12.0 GB of 24.0 GB, 30 s left",
        "loading the transformer: 24.0 GB of 24.0 GB, 0 s left",
        "loading the transformer: 24.0 GB in 60 s",
    ]


def test_what_is_quick_or_fails_leaves_no_line(clock, capsys):
    with bar("loading", 10, "bytes") as advance:
        clock[0] += 1
        advance(10)

    def failing():
        with bar("encoding", 2) as advance:
            clock[0] += 10
            advance(1)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        failing()
    assert capsys.readouterr().err == ""


def test_items_are_counted_also_where_not_all_are_taken(clock, capsys):
    taken = []
    for item in shown(iter(range(5)), "encoding batches", 5):
        clock[0] += 3
        taken.append(item)
        if item == 2:
            break
    assert taken == [0, 1, 2]
    assert capsys.readouterr().err == ""
    for _ in shown([1, 2], "encoding batches", 2):
        clock[0] += 3
    assert capsys.readouterr().err == "encoding batches: 2 in 6 s\n"


def test_on_a_terminal_the_bar_fits_80_columns(clock, monkeypatch):
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(bars, "Console", lambda **_: terminal)
    with bar("loading the text encoder", 9_900_000_000, "bytes") as advance:
        clock[0] += 5
        advance(9_900_000_000)
    lines = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", s) for s in re.split("[\r\n]", written.getvalue())
    ]
    assert max(map(len, lines)) <= 80
    assert any("9.9/9.9 GB" in line for line in lines)
    assert lines[-2] == "loading the text encoder: 9.9 GB in 5 s"


def test_times_in_words():
    assert [period(s) for s in (12.4, 210, 7560)] == ["12 s", "3.5 min", "2.1 h"]
