"""Progress bars, and checks of destinations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from taca_jax.errors import UserError


@contextmanager
def progress(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr for `size` bytes; yields a function to call with bytes done."""
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
    """Raises UserError if `dst` is a file or a folder that is not empty."""
    if dst.is_file() or (dst.is_dir() and any(dst.iterdir())):
        raise UserError(f"{dst} exists and is not empty; give a new folder or empty that one")
