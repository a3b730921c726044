"""Where a conversion writes, and how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from taca_jax.errors import UserError


@contextmanager
def progress(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr of so many bytes; gives what is to be called with bytes that are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=size)
        yield lambda amount: progress.advance(task, amount)


def check_free(dst: Path) -> None:
    """Raises UserError where `dst` holds something already."""
    if dst.is_file() or (dst.is_dir() and any(dst.iterdir())):
        raise UserError(f"{dst} exists and is not empty; give a new folder or empty that one")
