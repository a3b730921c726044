"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from taca_jax.errors import UserError


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place when the block ends, and only then.

    A folder that was at `path` is replaced. When the block fails nothing changes at `path` and the
    new folder is removed; a kill leaves it as `.NAME.*.partial`, which nothing reads. What the
    system refuses (a full disk, no permission) is raised as UserError.
    """
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            made.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
            yield made
            _flush(made)
            if path.exists():
                old = made.with_suffix(".replaced")
                path.rename(old)
                made.rename(path)
                shutil.rmtree(old)
            else:
                made.rename(path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """As `whole_folder`, for a file: the name to write to, renamed to `path` at the end."""
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        made = Path(name)
        try:
            made.chmod(0o666 & ~_umask())
            yield made
            _flush(made)
            made.replace(path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}) and was left as it was; "
            "make room there or write elsewhere"
        ) from error


def _flush(made: Path) -> None:
    """Hands everything to the disk, so that the rename cannot outlive a power cut without it."""
    for each in [made, *made.rglob("*")]:
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
