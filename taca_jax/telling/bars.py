"""Progress of what takes a while: a bar on a terminal, and lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeVar

import jax
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from taca_jax.parallel.processes import is_first

SAID_FROM_SECONDS = 2.0
"""What took less leaves no line."""

LINE_SECONDS = 30.0
"""Off a terminal, a line on what is under way at most this often."""

SPEED_SECONDS = 1800.0
"""The time that is left is estimated from the progress of so long. Rich's own 30 s would show none
where a single step takes longer."""

Unit = Literal["bytes", "items"]
T = TypeVar("T")


@contextmanager
def bar(what: str, total: int, unit: Unit = "items") -> Iterator[Callable[[int], None]]:
    """Shows how much of `total` is done, on stderr, in the first process only.

    Yields a function to call with how much was done since its last call. On a terminal there is a
    bar with the time that is left, elsewhere a line every 30 s; in the end both leave a line that
    says how long it took, unless that was under 2 s.
    """
    # JAX need not look for devices because of a bar: conversion uses none.
    if jax.distributed.is_initialized() and not is_first():
        yield lambda amount: None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        expand=True,
        speed_estimate_period=SPEED_SECONDS,
    )
    lines = _Lines(what, total, unit, console)
    with progress if console.is_terminal else nullcontext():  # Rich below 15 ends with a blank line
        task = progress.add_task(what, total=total)

        def advance(amount: int) -> None:
            progress.advance(task, amount)
            lines.advance(amount)

        yield advance
    lines.finish()


def shown(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items, with a `bar` that counts them."""
    with bar(what, total) as advance:
        for item in items:
            yield item
            advance(1)


class _Lines:
    """The lines about one bar."""

    def __init__(self, what: str, total: int, unit: Unit, console: Console):
        self._what = what
        self._total = total
        self._unit: Unit = unit
        self._console = console
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, amount: int) -> None:
        """Counts; off a terminal, says how far it is if no line has said so for a while."""
        self._done += amount
        now = time.monotonic()
        if self._console.is_terminal or now - self._last < LINE_SECONDS or not self._done:
            return
        self._last = now
        left = (now - self._start) * (self._total / self._done - 1)
        self._say(f"{self._amount(self._done)} of {self._amount(self._total)}, {period(left)} left")

    def finish(self) -> None:
        seconds = time.monotonic() - self._start
        if seconds >= SAID_FROM_SECONDS:
            self._say(f"{self._amount(self._done)} in {period(seconds)}")

    def _say(self, words: str) -> None:
        self._console.print(f"{self._what}: {words}", markup=False, highlight=False, soft_wrap=True)

    def _amount(self, number: int) -> str:
        return decimal(number) if self._unit == "bytes" else f"{number:,}"


def period(seconds: float) -> str:
    """A time in words: 12 s, 3.5 min, 2.1 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
