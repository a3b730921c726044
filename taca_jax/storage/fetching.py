"""Copies files of a bucket to this machine, where they stay: `~/.cache/taca_jax/buckets`, or the
same in XDG_CACHE_HOME."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from taca_jax.caches import cache_folder
from taca_jax.errors import UserError
from taca_jax.storage.places import SCHEME, Stat, read_bytes, reason
from taca_jax.telling.bars import bar

if TYPE_CHECKING:
    from etils import epath

_LOG = logging.getLogger(__name__)

_PIECE = 2**25
"""Bytes that are asked for at once; one connection gives a fraction of what a machine can take."""

_CONNECTIONS = 8


def copy_of(path: "epath.Path") -> Path:
    """Where the copy of an object or a folder of a bucket is, if it has been fetched."""
    return cache_folder("buckets") / str(path).removeprefix(SCHEME)


def fetch(folder: "epath.Path", files: Mapping[str, Stat], *, quiet: bool = False) -> Path:
    """The local copy of a bucket's folder, with these files of it, of those sizes and times.

    Only files that have changed or are not there yet are fetched, and those of an interrupted fetch
    are kept as far as they were whole. quiet: nothing is said of it, as it takes no time. Raises
    UserError where the disk is full, or the bucket refuses.
    """
    copy = copy_of(folder)
    absent = {name: stat for name, stat in files.items() if not is_copy(copy / name, stat)}
    if not absent:
        return copy
    size = sum(stat.size for stat in absent.values())
    copy.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(copy).free) < size:
        raise UserError(
            f"{folder} takes {decimal(size)} in {copy}, where {decimal(free)} are free; "
            "make room there, or set XDG_CACHE_HOME to a folder of a larger disk"
        )
    shown = f"{len(absent)} files" if len(absent) > 1 else next(iter(absent))
    if not quiet:
        _LOG.warning("fetching %s (%s) of %s", shown, decimal(size), folder)
    with nullcontext(lambda _: None) if quiet else bar("fetching", size, "bytes") as advance:
        for name, stat in absent.items():
            try:
                _fetch(folder / name, copy / name, stat, advance)
            except OSError as error:
                raise UserError(
                    f"{folder / name} could not be fetched ({error.strerror or reason(error)}); "
                    "the same command goes on where it stopped"
                ) from error
    _date_folders(copy, files)
    return copy


def is_copy(file: Path, stat: Stat) -> bool:
    try:
        found = file.stat()
    except OSError:
        return False
    return found.st_size == stat.size and round(found.st_mtime) == round(stat.written)


def _fetch(path: "epath.Path", file: Path, stat: Stat, advance: Callable[[int], None]) -> None:
    """Copies one object, in pieces at a time; the file has its name once it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f".{file.name}.{os.getpid()}.partial")
    handle = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:

        def piece(start: int) -> int:
            size = min(_PIECE, stat.size - start)
            content = read_bytes(path, start, size)
            if len(content) != size:
                raise OSError("it has changed meanwhile")
            os.pwrite(handle, content, start)
            return size

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for size in pool.map(piece, range(0, stat.size, _PIECE)):
                advance(size)
        os.utime(made, (stat.written, stat.written))
        made.replace(file)
    finally:
        os.close(handle)
        made.unlink(missing_ok=True)


def _date_folders(copy: Path, files: Mapping[str, Stat]) -> None:
    """Gives folders the time of what is in them, so that copies on several machines are alike."""
    newest = max(stat.written for stat in files.values())
    for folder in {(copy / name).parent for name in files}:
        os.utime(folder, (newest, newest))
