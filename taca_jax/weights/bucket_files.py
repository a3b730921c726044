"""Weights in a bucket: what is read of them is copied to this machine, as from a hub."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taca_jax.errors import UserError
from taca_jax.hub.ids import HubId, Select, Selection
from taca_jax.storage.fetching import copy_of, fetch
from taca_jax.storage.places import Stat, files_in, in_bucket, place
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE
from taca_jax.weights.hub_files import MODELS, pipeline_files
from taca_jax.weights.loose_files import PLACES
from taca_jax.weights.original_pipelines import TOKENIZERS

if TYPE_CHECKING:
    from etils import epath


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
    path = place(name)
    assert in_bucket(path)
    if not download:
        return copy_of(path)
    if inside := files_in(path):
        return _fetched(_InBucket(str(path)), path, inside, select)
    folder = path.parent
    beside = files_in(folder, deep=False)
    if path.name not in beside:
        raise UserError(f"{name} is not there: the bucket has no such object, and no such folder")
    for part in (*MODELS, *TOKENIZERS):  # and not all of what may be a large folder
        beside |= {f"{part}/{file}": stat for file, stat in files_in(folder / part).items()}
    return _fetched(_InBucket(str(folder), inside=path.name), folder, beside, select)


def _fetched(found: HubId, folder: "epath.Path", files: Mapping[str, Stat], select: Select) -> Path:
    names = list(files)
    loose = select is pipeline_files and not found.inside and _loose(names)
    selection = Selection(tuple(loose), "") if loose else select(found, names)
    return fetch(folder, {name: files[name] for name in selection.files}) / selection.opened


def _loose(names: Sequence[str]) -> list[str]:
    """The files of a folder of models as single files, side by side or in ComfyUI's folders."""
    if {PIPELINE_FILE, f"transformer/{CONFIG}", CONFIG} & {*names}:
        return []
    places = ("", *PLACES)
    files = [name for name in names if name.endswith(".safetensors")]
    return [name for name in files if name.rpartition("/")[0].partition("/")[0] in places]
