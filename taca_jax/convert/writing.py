"""Progress bars, and checks of destinations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.telling.bars import bar


@contextmanager
def progress(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar for `size` bytes of what is written; yields a function to call with bytes done."""
    with bar(f"writing {name}", size, "bytes") as advance:
        yield advance


def check_free(dst: Path) -> None:
    """Raises UserError if `dst` is a file or a folder that is not empty."""
    if dst.is_file() or (dst.is_dir() and any(dst.iterdir())):
        raise UserError(f"{dst} exists and is not empty; give a new folder or empty that one")
