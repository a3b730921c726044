"""Atomic writing of files and folders.

They are written to a folder `.NAME.*.partial` beside the destination, which nothing reads and which
the writer removes. If the writer is killed, the next writer of the same destination removes it. In
a bucket nothing can be renamed: they are written to a local folder and copied (`storage.writing`).
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
from taca_jax.storage.places import Place, in_bucket, reason
from taca_jax.storage.writing import uploaded_file, uploaded_folder

NEW, REPLACED, LOCK = "new", "replaced", "lock"
"""The contents of a `.partial` folder; the lock is held as long as the writer lives."""


@contextlib.contextmanager
def whole_folder(path: Place, marker: str | None = None) -> Iterator[Path]:
    """Yields an empty folder that is renamed to `path` when the block succeeds.

    A folder at `path` is replaced. If the block fails, `path` is unchanged. marker: for buckets,
    the file in the folder without which it is not read. OSErrors (a full disk, no permission) and
    what a bucket refuses are raised as UserError.
    """
    if in_bucket(path):
        assert marker is not None
        with _refusals_as_user_errors(path), uploaded_folder(path, marker) as made:
            yield made
        return
    with _refusals_as_user_errors(path), _partial_folder(path) as place:
        made = place / NEW
        made.mkdir()
        yield made
        _flush(made)
        if path.exists():
            path.rename(place / REPLACED)
        made.rename(path)


@contextlib.contextmanager
def whole_file(path: Place) -> Iterator[Path]:
    """Like `whole_folder` for a file: yields the path to write to, which is renamed to `path`."""
    if in_bucket(path):
        with _refusals_as_user_errors(path), uploaded_file(path) as made:
            yield made
        return
    with _refusals_as_user_errors(path), _partial_folder(path) as place:
        made = place / NEW
        yield made
        _flush(made)
        made.replace(path)


def check_writable(folder: Place) -> None:
    """Raises UserError unless files can be written into a folder, which need not be there yet.

    Nothing is left behind. What a bucket refuses is known when it is written to.
    """
    if in_bucket(folder):
        return
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = f"{there} is a file" if there.is_file() else f"{there}: {error.strerror}"
        raise UserError(f"{folder} cannot be written to ({reason}); write elsewhere") from error


@contextlib.contextmanager
def _refusals_as_user_errors(path: Place) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if in_bucket(path) and _of_bucket(error):
            raise UserError(f"{path} could not be written: {reason(error)}") from error
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path} could not be written ({error.strerror or error}) and was left as it was; "
            "make room there or write elsewhere"
        ) from error


def _of_bucket(error: Exception) -> bool:
    """Whether an error is of the storage library, and not of the local disk."""
    libraries = ("gcsfs", "google", "aiohttp")
    with_number = isinstance(error, OSError) and error.errno is not None
    return type(error).__module__.startswith(libraries) or (
        isinstance(error, OSError) and not with_number
    )


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A locked temporary folder beside `path`, on the same file system."""
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
    """Holds the lock of a new `.partial` folder; the system releases it when the writer dies."""
    made = place / f"{LOCK}.{NEW}"
    handle = os.open(made, os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: leftovers stay
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made.rename(place / LOCK)  # renamed once locked, so LOCK is never seen unlocked
        yield
    finally:
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Removes the `.partial` folders of `path` whose writers are dead, and no others."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\w+\.partial")
    for place in path.parent.iterdir():
        if name.fullmatch(place.name) is None:
            continue
        # An OSError means that the writer lives, has not locked yet, or that there are no locks
        # here: the folder is kept.
        with contextlib.suppress(OSError):
            handle = os.open(place / LOCK, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(place, path)
            finally:
                os.close(handle)


def _remove(place: Path, path: Path) -> None:
    """Removes a `.partial` folder; moves the replaced folder back if nothing is at `path`."""
    replaced = place / REPLACED
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    for each in (replaced, place / NEW, place):  # the lock last, in case this is killed too
        shutil.rmtree(each, ignore_errors=True)


def _flush(made: Path) -> None:
    """Flushes everything to disk, so that after a power cut no rename is without its contents."""
    for each in [made, *made.rglob("*")]:
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
