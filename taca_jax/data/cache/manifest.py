"""The record of how a cache was made."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from taca_jax.data.cache.files import EMPTY, SIZES
from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.storage.places import Place

_FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """How a cache was made; it serves runs whose models and data are the same.

    made_with: the models that encoded, by part: kind, sum of the parameters, digest of the config.
    files: a digest of the names, sizes and times of the models' files, by which they are known to
      be unchanged without reading them.
    data: the fields of the data's configuration that decide the pictures (`picture_fields`).
    sources: how many examples each source has.
    dtype: of the embeddings of tokens; pooled embeddings are float32.
    latents_dtype: of the latents.
    channels, downscale: of the latents; a pixel of them is `downscale` pixels of the picture.
    moments: whether latents have a log variance; means are then not yet scaled and shifted.
    text, pooled: shapes of a caption's embeddings, [t, k] and [p].
    examples: how many were encoded, once the cache is complete.
    """

    made_with: dict[str, Any]
    files: str
    data: dict[str, Any]
    sources: list[int]
    dtype: str
    latents_dtype: str
    channels: int
    downscale: int
    moments: bool
    text: list[int]
    pooled: list[int]
    examples: int | None = None
    format: int = _FORMAT

    def write(self, folder: Place) -> None:
        with whole_file(folder / _MANIFEST) as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_manifest(folder: Place) -> Manifest | None:
    """The manifest of the cache in `folder`; None where there is no cache yet.

    Raises UserError for a folder with something else in it, and for a cache of another version.
    """
    file = folder / _MANIFEST
    if not file.is_file():
        # A process that is killed before it writes the manifest leaves these; they are replaced.
        ours = re.compile(rf"{EMPTY}|{SIZES}|\..+\.partial")
        if folder.is_dir() and not all(ours.fullmatch(each.name) for each in folder.iterdir()):
            raise UserError(f"{folder} is not empty and no cache; give another data.cache")
        return None
    try:
        record = json.loads(file.read_text())
        if record["format"] == _FORMAT:
            return Manifest(**record)
        reason = f"of format {record['format']}, this version reads {_FORMAT}"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"damaged: {error}"
    raise UserError(f"{file} is {reason}; remove {folder} to encode anew")


def picture_fields(data: DataConfig) -> dict[str, Any]:
    """The fields of the configuration that decide which pictures and captions a cache holds."""
    return {
        "source": list(data.source),
        "resolution": data.resolution,
        "aspect": data.aspect,
        "max_aspect": data.max_aspect,
        "min_side": data.min_side,
        "caption": data.caption,
    }


def differences(made: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The names under which two records differ, sorted."""
    return sorted(name for name in made.keys() | asked.keys() if made.get(name) != asked.get(name))
