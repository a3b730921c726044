"""Weights in a bucket: what is read of them is copied to this machine, as from a hub."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taca_jax.autoencoders.tiny_vae_layout import pair_of
from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import LENGTH_BYTES
from taca_jax.hub.ids import HubId, Select, Selection
from taca_jax.storage.fetching import copy_of, fetch, is_copy
from taca_jax.storage.places import SCHEME, Stat, files_in, in_bucket, place, read_bytes
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE
from taca_jax.weights.hub_files import MODELS, pipeline_files
from taca_jax.weights.loose_files import PLACES
from taca_jax.weights.original_pipelines import TOKENIZERS

if TYPE_CHECKING:
    from etils import epath

_FIRST = 2**17
"""Bytes that are read of a file at first, which hold most headers."""


@dataclass(frozen=True)
class _InBucket(HubId):
    """A folder of a bucket (`repo`), or what is inside; selected from as a repository is."""

    def __str__(self) -> str:
        return f"{self.repo}/{self.inside}" if self.inside else self.repo


@functools.cache
def bucket_weights(name: str, select: Select, *, download: bool = True) -> Path:
    """The local copy of what `select` opens of a folder or a file in a bucket, with all that it
    selects.

    Files that have changed are fetched again; a bucket is asked once a process. Without `download`
    it is not asked: the copy may then be old, or not be there. Raises UserError for what is not
    there, and for a bucket that refuses.
    """
    if not download:
        path = place(name)
        assert in_bucket(path)
        return copy_of(path)
    folder, files, opened = _selected(name, select)
    return fetch(folder, files) / opened


def bucket_headers(name: str, select: Select, folder: Path) -> Path:
    """Like `bucket_weights`, but of weights that have no copy here only headers are read.

    The files appear in a `folder` of the caller's, under the bucket's name: weights without a copy
    as files that have their headers, and a hole where the tensors are, others as links to copies.
    Raises UserError as `bucket_weights` does.
    """
    there, files, opened = _selected(name, select)
    copy, root = copy_of(there), folder / str(there).removeprefix(SCHEME)
    others = {
        file: stat
        for file, stat in files.items()
        if not file.endswith(".safetensors") or is_copy(copy / file, stat)
    }
    if others:
        fetch(there, others, quiet=True)
    for file, stat in files.items():
        made = root / file
        made.parent.mkdir(parents=True, exist_ok=True)
        if file in others:
            made.symlink_to(copy / file)
        else:
            _write_header(there / file, stat.size, made)
    return root / opened


def _write_header(path: "epath.Path", size: int, made: Path) -> None:
    """Writes a file with the header of a safetensors object, and a hole in place of its data.

    An object that has no such header gives a file that is damaged in the same way.
    """
    try:
        start = read_bytes(path, 0, _FIRST)
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        end = LENGTH_BYTES + length
        if _FIRST < end <= size:
            start += read_bytes(path, _FIRST, end - _FIRST)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    with made.open("wb") as file:
        file.write(start[:end])
        file.truncate(size)


def _selected(name: str, select: Select) -> tuple["epath.Path", dict[str, Stat], str]:
    """A folder of a bucket, what `select` takes of its files, and what of them is opened then."""
    path = place(name)
    assert in_bucket(path)
    if inside := files_in(path):
        found, folder, files = _InBucket(str(path)), path, inside
    else:
        found, folder = _InBucket(str(path.parent), inside=path.name), path.parent
        files = files_in(folder, deep=False)
        if not {path.name, *pair_of(path.name)} & {*files}:
            raise UserError(
                f"{name} is not there: the bucket has no such object, and no such folder"
            )
        for part in (*MODELS, *TOKENIZERS):  # and not all of what may be a large folder
            files |= {f"{part}/{file}": stat for file, stat in files_in(folder / part).items()}
    loose = select is pipeline_files and not found.inside and _loose(list(files))
    selection = Selection(tuple(loose), "") if loose else select(found, list(files))
    return folder, {file: files[file] for file in selection.files}, selection.opened


def _loose(names: Sequence[str]) -> list[str]:
    """The files of a folder of models as single files, side by side or in ComfyUI's folders."""
    if {PIPELINE_FILE, f"transformer/{CONFIG}", CONFIG} & {*names}:
        return []
    places = ("", *PLACES)
    files = [name for name in names if name.endswith(".safetensors")]
    return [name for name in files if name.rpartition("/")[0].partition("/")[0] in places]
