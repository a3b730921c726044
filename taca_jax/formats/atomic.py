"""Files and folders that are written whole or not at all.

Writing happens in a folder `.NAME.*.partial` beside the destination, which nothing reads. It ends
with its writer; one that a kill has left is removed by the next writer of the same destination.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from taca_jax.errors import UserError

NEW, REPLACED, LOCK = "new", "replaced", "lock"
"""What a `.partial` folder holds; the lock is held as long as the writer lives."""


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the block ends, and only then.

    A folder that was at `path` is replaced. When the block fails nothing changes at `path`. What
    the system refuses (a full disk, no permission) is raised as UserError.
    """
    with _refusals(path), _workplace(path) as place:
        made = place / NEW
        made.mkdir()
        yield made
        _flush(made)
        if path.exists():
            path.rename(place / REPLACED)
        made.rename(path)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """As `whole_folder`, for a file: the name to write to, renamed to `path` at the end."""
    with _refusals(path), _workplace(path) as place:
        made = place / NEW
        yield made
        _flush(made)
        made.replace(path)


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}) and was left as it was; "
            "make room there or write elsewhere"
        ) from error


@contextlib.contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A locked folder beside `path`, on its file system, that is gone after the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    place = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        with _lock(place):
            yield place
    finally:
        _remove(place, path)


@contextlib.contextmanager
def _lock(place: Path) -> Iterator[None]:
    """Holds the lock of a new workplace; the system drops it when the writer dies."""
    made = place / f"{LOCK}.{NEW}"
    handle = os.open(made, os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):  # without locks there, what a kill leaves stays
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made.rename(place / LOCK)  # under this name nobody ever sees it free while we live
        yield
    finally:
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Removes the workplaces for `path` whose writers are dead, and no other."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\w+\.partial")
    for place in path.parent.iterdir():
        if name.fullmatch(place.name) is None:
            continue
        # No lock to be had is no proof of death: the writer may live, be about to lock, or write
        # where there are no locks.
        with contextlib.suppress(OSError):
            handle = os.open(place / LOCK, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(place, path)
            finally:
                os.close(handle)


def _remove(place: Path, path: Path) -> None:
    """Removes a workplace; what it took from `path` goes back where nothing has come instead."""
    replaced = place / REPLACED
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    for each in (replaced, place / NEW, place):  # the lock goes last: this too may be killed
        shutil.rmtree(each, ignore_errors=True)


def _flush(made: Path) -> None:
    """Hands everything to the disk, so that the rename cannot outlive a power cut without it."""
    for each in [made, *made.rglob("*")]:
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
