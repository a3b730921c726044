"""Folders and files that may be in a bucket of Cloud Storage: `gs://BUCKET/FOLDER`.

A `Place` is a local Path or a path in a bucket, which reads like one (etils' epath). Its objects
are written whole or not at all; a folder there exists as long as something is in it.
"""

import errno
import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from taca_jax.errors import UserError

if TYPE_CHECKING:  # it is imported where a bucket is used
    from etils import epath
    from typing_extensions import TypeIs

Place: TypeAlias = Union[Path, "epath.Path"]

SCHEME = "gs://"

_FORM = re.compile(r"gs://[\w.-]+(/[^?#]*)?")
_NO_BUCKET, _UNKNOWN, _FORBIDDEN = 404, 401, 403


@dataclass(frozen=True)
class Stat:
    """size: in bytes. written: when, in seconds since 1970."""

    size: int
    written: float


def is_bucket_name(name: str | Place) -> bool:
    """Whether a name is that of a place in a bucket."""
    return str(name).startswith(SCHEME)


def place(name: str | Place) -> Place:
    """The folder or file of a name: in a bucket if it begins with gs://, else a local path.

    Nothing is asked of the bucket. Raises UserError where the library for it is missing.
    """
    if not is_bucket_name(name):
        return Path(name)
    if _FORM.fullmatch(str(name)) is None:
        raise UserError(f"{name} names no bucket; expected gs://BUCKET/FOLDER")
    filesystem()
    from etils import epath

    return epath.Path(str(name))


def in_bucket(path: Place) -> "TypeIs[epath.Path]":
    """Whether a place is in a bucket."""
    return not isinstance(path, Path)


@cache
def filesystem() -> Any:
    """The library's access to all buckets, an fsspec file system; paths in a bucket share it.

    It is configured by the library's own means: Google's application default credentials, and
    STORAGE_EMULATOR_HOST. Raises UserError where it is not installed.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError("gs://... needs the package gcsfs: pip install 'taca-jax[gcs]'")
    # Otherwise epath reads with TensorFlow wherever that is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config

    # Other processes write to the same folders.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # It prints tracebacks of what it also raises, and at each call that it may not know a bucket.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs", finalize_on_close=True)  # as epath opens it


def reach(path: Place) -> None:
    """Raises UserError unless the bucket of a place is there and may be read; of a local path
    nothing is asked."""
    if in_bucket(path):
        _reach(path.parts[2])


@cache
def _reach(bucket: str) -> None:
    try:
        filesystem().call("GET", "b/{}/o", bucket, maxResults=1)
    except Exception as error:  # of gcsfs, Google's authentication and the connection
        raise UserError(f"gs://{bucket} cannot be used: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why a bucket refused, in one line that says what to do."""
    text = (str(error).strip() or repr(error)).splitlines()
    code = getattr(error, "code", None)
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket or object; buckets are made with `gcloud storage buckets`"
    if code in (_UNKNOWN, str(_UNKNOWN)) or type(error).__module__.startswith("google.auth"):
        return (
            "no credentials: run `gcloud auth application-default login`, or give this machine a "
            "service account that may use it"
        )
    if text[0].startswith("Forbidden") or code in (_FORBIDDEN, str(_FORBIDDEN)):
        return f"the account may not ({text[-1]}); give it the role Storage Object Admin there"
    return text[0]


def stats(paths: Sequence[Place]) -> list[Stat | None]:
    """Size and time of each file; None for what is none. Each folder of a bucket is asked once."""
    listed: dict[str, dict[str, Stat]] = {}

    def stat(path: Place) -> Stat | None:
        if not in_bucket(path):
            if not path.is_file():
                return None
            found = path.stat()
            return Stat(found.st_size, found.st_mtime_ns / 1e9)
        folder = str(path.parent)
        if folder not in listed:
            listed[folder] = files_in(path.parent, deep=False)
        return listed[folder].get(path.name)

    return [stat(path) for path in paths]


def files_in(folder: "epath.Path", *, deep: bool = True) -> dict[str, Stat]:
    """The files in a bucket's folder, by their path relative to it; `deep` includes those of its
    folders. Empty if there is none. Raises UserError where the bucket refuses."""
    reach(folder)
    prefix = str(folder).removeprefix(SCHEME).rstrip("/") + "/"
    found = filesystem().find(prefix, detail=True, maxdepth=None if deep else 1)
    return {
        name.removeprefix(prefix): Stat(int(info["size"]), info["mtime"].timestamp())
        for name, info in sorted(found.items())
        if info["type"] == "file" and name.startswith(prefix) and not name.endswith("/")
    }


def read_bytes(path: "epath.Path", start: int = 0, size: int | None = None) -> bytes:
    """All of an object, or a part: fewer bytes where it ends before. Raises OSError, with a number
    and a text as of a disk, where it cannot be read."""
    try:
        end = None if size is None else start + size
        return filesystem().cat_file(str(path), start=start, end=end)
    except Exception as error:  # as in `_reach`
        raise OSError(errno.EIO, reason(error)) from error
