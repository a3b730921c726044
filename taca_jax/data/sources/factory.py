"""Opens the sources that `data.source` names."""

from typing import cast

from taca_jax.data.config import DataConfig
from taca_jax.data.shapes.captions import CATEGORIES
from taca_jax.data.shapes.drawing import IMAGE_SIZE
from taca_jax.data.shapes.examples import GeneratedShapes
from taca_jax.data.sources.captions import GivenCaption
from taca_jax.data.sources.folders import FolderSource, check_folder
from taca_jax.data.sources.img2dataset import check_output, open_img2dataset
from taca_jax.data.sources.mixing import MixedSource
from taca_jax.data.sources.source import Source
from taca_jax.data.sources.tars import expand
from taca_jax.data.sources.webdataset import TarSource
from taca_jax.errors import UserError
from taca_jax.storage import places

GENERATED_SIZE = 2**20
"""How many examples `generated:shapes` has where no number is given."""

_MAX_SIZE = 2**24  # the order of an epoch is held in memory


def open_source(data: DataConfig, patch: int | None = None) -> Source:
    """The source that `data.source` names, or where it names several, a MixedSource.

    `[index]` gives pictures as squares of `data.resolution` pixels a side. patch: pixels per side
    of the patches whose labels generated shapes are to have. Raises UserError for a source that is
    unknown, missing, empty or mostly unusable, and for a resolution that shapes do not have.
    """
    parts = [_open(name, data, patch) for name in data.source]
    return parts[0] if len(parts) == 1 else MixedSource(parts)


def check_there(data: DataConfig) -> None:
    """Raises UserError as `open_source` does for folders and tars that are not there; no file is
    read, and no folder listed."""
    for name in data.source:
        kind, _, place = name.partition(":")
        match kind:
            case "folder":
                check_folder(places.place(place))
            case "webdataset":
                expand(place)
            case "img2dataset":
                check_output(places.place(place))


def _open(source: str, data: DataConfig, patch: int | None) -> Source:
    kind, _, place = source.partition(":")
    given = GivenCaption(data.caption)
    match kind:
        case "folder":
            root = places.place(place)
            return FolderSource(root, data.resolution, data.max_bad_share, given=given)
        case "webdataset":
            return TarSource(expand(place), data.resolution, data.max_bad_share, given=given)
        case "img2dataset":
            root = places.place(place)
            return open_img2dataset(root, data.resolution, data.max_bad_share, given)
        case "tfds" if place.partition("/")[0] != "shapes":
            # Imported here because it takes seconds, which the other sources need not wait for.
            from taca_jax.data.sources.tfds import TfdsSource

            return TfdsSource(place, data.resolution, data.max_bad_share, given)
        case _:
            return _open_shapes(source, kind, place, data, patch)


def _open_shapes(source: str, kind: str, place: str, data: DataConfig, patch: int | None) -> Source:
    place, _, category = place.partition("#")
    name, _, rest = place.partition("/")
    if name != "shapes":
        raise UserError(f"data.source is {source}; only shapes are generated")
    if data.resolution != IMAGE_SIZE:
        raise UserError(
            f"data.resolution is {data.resolution}, but shapes are drawn at {IMAGE_SIZE} pixels "
            f"and not resized: set data.resolution={IMAGE_SIZE}"
        )
    if kind == "generated":
        size = rest or str(GENERATED_SIZE)
        if not (size.isascii() and size.isdigit() and 1 <= int(size) <= _MAX_SIZE):
            raise UserError(
                f"data.source is {source}; after generated:shapes/ comes a number of "
                f"examples, 1 to {_MAX_SIZE}"
            )
        if category and category not in CATEGORIES:
            raise UserError(
                f"data.source is {source}; after # comes one of {', '.join(CATEGORIES)}"
            )
        drawn = GeneratedShapes("train", int(size), category=category or None, patch=patch)
        return cast(Source, drawn)
    if category:
        raise UserError(f"data.source is {source}; only generated:shapes has categories after #")
    from taca_jax.data.shapes import dataset  # here for the same reason

    # `load` refuses an unknown size.
    stored = dataset.load(rest or "small", "train")  # pyright: ignore[reportArgumentType]
    return cast(Source, stored)  # its examples have one caption, where others may have several
