"""Sources of captioned pictures by name: `open_source` is the only way in."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast

from taca_jax.data.config import DataConfig
from taca_jax.data.shapes.drawing import IMAGE_SIZE
from taca_jax.data.shapes.examples import GeneratedShapes
from taca_jax.data.sources.base import Example, PictureSource, Source
from taca_jax.data.sources.folders import FolderSource
from taca_jax.data.sources.img2dataset import open_img2dataset
from taca_jax.data.sources.tars import expand
from taca_jax.data.sources.webdataset import TarSource
from taca_jax.errors import UserError

GENERATED_SIZE = 2**20

_MAX_SIZE = 2**24  # an epoch's order is held in memory


class MixedSource:
    """Several sources one after the other, as one."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = tuple(parts)
        self.starts = (0, *accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Example:
        part, within = self.find(index)
        return part[within]

    def find(self, index: int) -> tuple[Source, int]:
        """The source of an example, and its index there. Raises IndexError where there is none."""
        for part, start in zip(self.parts, self.starts, strict=False):
            if start <= index < start + len(part):
                return part, index - start
        raise IndexError(f"index {index} is not in 0..{len(self) - 1}")


def parts_of(source: Source) -> Sequence[Source]:
    """The sources that a source is put together of, or itself."""
    return source.parts if isinstance(source, MixedSource) else (source,)


def read_example(source: Source, index: int, size: tuple[int, int] | None) -> Example:
    """An example, its picture brought to (height, width), or as the source gives it.

    Raises BadExampleError for one that cannot be read.
    """
    if size is None:
        return source[index]
    part, within = source.find(index) if isinstance(source, MixedSource) else (source, index)
    # Others have pictures of one size, which is the only bucket that they can be in.
    return part.read(within, size) if isinstance(part, PictureSource) else part[within]


def summaries(source: Source) -> list[str]:
    """What was skipped of a source, a line for each of its parts that had something bad."""
    bad = [part.bad.summary() for part in parts_of(source) if isinstance(part, PictureSource)]
    return [line for line in bad if line]


def open_source(data: DataConfig) -> Source:
    """The source that `data.source` names, or of several a MixedSource.

    By index, pictures are squares of `data.resolution`. Raises UserError for a source that is
    unknown, empty, missing or mostly unusable, and for a resolution that shapes do not have.
    """
    parts = [_open(name, data) for name in data.source]
    return parts[0] if len(parts) == 1 else MixedSource(parts)


def _open(source: str, data: DataConfig) -> Source:
    kind, _, place = source.partition(":")
    match kind:
        case "folder":
            return FolderSource(Path(place), data.resolution, data.max_bad_share)
        case "webdataset":
            return TarSource(expand(place), data.resolution, data.max_bad_share)
        case "img2dataset":
            return open_img2dataset(Path(place), data.resolution, data.max_bad_share)
        case "tfds" if place.partition("/")[0] != "shapes":
            # Imported here because it takes seconds, which the other sources need not wait for.
            from taca_jax.data.sources.tfds import TfdsSource

            return TfdsSource(place, data.resolution, data.max_bad_share)
        case _:
            return _shapes(source, kind, place, data)


def _shapes(source: str, kind: str, place: str, data: DataConfig) -> Source:
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
        return cast(Source, GeneratedShapes("train", int(size)))
    from taca_jax.data.shapes import dataset as shapes  # here as above

    # `load` refuses an unknown size.
    stored = shapes.load(rest or "small", "train", shapes.DEFAULT_DATA_DIR)  # pyright: ignore[reportArgumentType]
    return cast(Source, stored)  # its examples have one caption, where others may have several
