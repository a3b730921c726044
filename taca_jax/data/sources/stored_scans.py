"""Stores what a scan of many files has found, so that the next start need not scan them again.

A result is an array in `~/.cache/taca_jax/data` (or `$XDG_CACHE_HOME/taca_jax/data`), outside the
data's own folders. It is found again only for the same scan of files that have not changed.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from taca_jax.caches import cache_folder
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.storage.places import Place, Stat, in_bucket, stats

_log = logging.getLogger(__name__)


def scan_once(
    name: str, rules: object, stamp: bytes, scan: Callable[[], tuple[np.ndarray, bool]]
) -> np.ndarray:
    """The array that `scan` finds, or found in an earlier run of the program.

    name: of the scan; part of the stored file's name. rules: what decides the result besides the
    files: a version of the scan, to be raised when its code finds something else, and constants
    such as the suffixes that it looks for; they are compared by their `repr`. stamp: of the files
    (`stamp_of`). scan: gives the array, and whether all files could be read; if the system refused
    one, which may pass, the result is not stored.
    """
    digest = hashlib.sha256(repr(rules).encode() + b"\n" + stamp).hexdigest()[:32]
    folder = cache_folder("data") / digest[:2]
    path = folder / f"{name}-{digest[2:]}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not stored yet, or damaged
        found, complete = scan()
    if not complete:
        return found
    try:
        with whole_file(path) as file, file.open("wb") as opened:
            np.save(opened, found)
    except UserError as error:  # a full disk, or no permission: the next run scans again
        _log.warning("%s", error)
    return found


def is_refusal(error: BaseException | None) -> bool:
    """Whether the system refused to read, as opposed to a library that found the content bad."""
    return isinstance(error, OSError) and error.errno is not None


def stamps_of(paths: Sequence[Place]) -> list[bytes]:
    """The stamp of each file; those in a bucket are not asked for one by one."""
    if not any(map(in_bucket, paths)):
        return [stamp_of(path) for path in paths if isinstance(path, Path)]
    return [stamp_in_bucket(*pair) for pair in zip(paths, stats(paths), strict=True)]


def stamp_in_bucket(path: Place, stat: Stat | None) -> bytes:
    """As `stamp_of`, of an object."""
    return f"{path}{stat}\n".encode()


def stamp_of(path: Path) -> bytes:
    """Bytes that change when the file does: its path, size and time of modification."""
    try:
        stat = path.stat()
    except OSError:
        return os.fsencode(path) + b"?"
    return os.fsencode(path.absolute()) + f"|{stat.st_size}|{stat.st_mtime_ns}\n".encode()
