"""What is found out about files once and kept for the next start, outside the data's folders.

It lies in `~/.cache/taca_jax/data` (`$XDG_CACHE_HOME` moves it), under the files' stamp: what was
found out about files that have changed since is never read again.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file

_log = logging.getLogger(__name__)


def kept_array(kind: str, stamp: bytes, find: Callable[[], tuple[np.ndarray, bool]]) -> np.ndarray:
    """What `find` finds, from the file of an earlier call with this stamp where there is one.

    kind: what sort of thing it is; part of the file's name. find: gives the array, and whether all
    could be read. What a refusal of the system has a part in is not kept: it may pass.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(stamp).hexdigest()[:32]
    folder = Path(cache).expanduser() / "taca_jax" / "data" / digest[:2]
    path = folder / f"{kind}-{digest[2:]}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # none yet, or cut off
        found, whole = find()
    if not whole:
        return found
    try:
        with whole_file(path) as file, file.open("wb") as opened:
            np.save(opened, found)
    except UserError as error:  # a disk that is full or not ours: found out again next time
        _log.warning("%s", error)
    return found


def was_refused(error: BaseException | None) -> bool:
    """Whether it is the system's refusal to read, and not what libraries say of a bad content."""
    return isinstance(error, OSError) and error.errno is not None


def stamp_of(path: Path) -> bytes:
    """Bytes that change when the file does: its path, size and time of modification."""
    try:
        stat = path.stat()
    except OSError:
        return os.fsencode(path) + b"?"
    return os.fsencode(path.absolute()) + f"|{stat.st_size}|{stat.st_mtime_ns}\n".encode()
