"""The progress bar of a sampling run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from taca_jax.parallel.processes import first_says, is_first
from taca_jax.telling.bars import SPEED_SECONDS


@contextmanager
def step_bar(
    steps: int, shown: bool | None, *, together: bool = False
) -> Iterator[Callable[[], None] | None]:
    """A progress bar on stderr; yields a function that advances it by a step.

    `shown` None shows the bar on a terminal only. Yields None if it is not shown. Processes that
    take the steps `together` all do as the first one does, which alone shows it.
    """
    console = Console(stderr=True)
    wanted = console.is_terminal if shown is None else shown
    if together and shown is None:
        wanted = first_says(wanted)
    if not wanted:
        yield None
        return
    if together and not is_first():
        yield lambda: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        transient=console.is_terminal,
        speed_estimate_period=SPEED_SECONDS,
    ) as bar:
        task = bar.add_task("steps", total=steps)
        yield lambda: bar.advance(task)
