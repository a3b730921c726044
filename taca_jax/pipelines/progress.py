"""The progress bar of a sampling run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def step_bar(steps: int, shown: bool | None) -> Iterator[Callable[[], None] | None]:
    """A progress bar on stderr; yields a function that advances it by a step.

    `shown` None shows the bar on a terminal only. Yields None if it is not shown.
    """
    console = Console(stderr=True)
    if not (console.is_terminal if shown is None else shown):
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("steps", total=steps)
        yield lambda: bar.advance(task)
