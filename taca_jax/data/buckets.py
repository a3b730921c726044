"""Sorts pictures by aspect into buckets, of which all pictures are brought to one size."""

import logging
from collections.abc import Sequence

import numpy as np

from taca_jax.data.config import DataConfig
from taca_jax.data.order import Bucket
from taca_jax.data.sources.mixing import parts_of
from taca_jax.data.sources.source import UNKNOWN_SIZE, PictureSource, Source
from taca_jax.errors import UserError

_SIDES_PER_RESOLUTION = 16
"""The sides of buckets are a 16th of the resolution apart, or more if the model requires it."""

_log = logging.getLogger(__name__)


def bucket_sizes(resolution: int, multiple: int, max_aspect: float) -> list[tuple[int, int]]:
    """(height, width) in pixels of the buckets, from the flattest to the tallest.

    One is the square of `resolution` pixels a side, and no other has a larger area. Sides are
    multiples of `multiple`; the longer is at most `max_aspect` times the shorter.
    """
    step = multiple * max(1, resolution // (_SIDES_PER_RESOLUTION * multiple))
    sizes = {(resolution, resolution)}
    for side in range(step, resolution, step):
        other = resolution**2 // side // step * step
        if other <= max_aspect * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def make_buckets(source: Source, data: DataConfig, *, multiple: int, least: int) -> list[Bucket]:
    """The buckets of the examples of `source`: of several aspects, or one square (`data.aspect`).

    Pictures with a side below `data.min_side` are left out. multiple: the sides of the model's
    pictures must be multiples of so many pixels. least: a bucket with fewer examples is dissolved,
    and they go to the nearest of the others. Raises UserError where no example is left, and where
    sizes are needed, for sources whose pictures all have one size.
    """
    parts = parts_of(source)
    starts = np.cumsum([0, *map(len, parts)])
    used = [np.arange(len(part)) for part in parts]
    if data.aspect == "square":
        side = data.resolution
        sizes, shapes = None, [(side, side)]
    else:
        shapes = bucket_sizes(data.resolution, multiple, data.max_aspect)
    if data.aspect == "buckets" or data.min_side:
        sizes = [_sizes(part, name, data) for part, name in zip(parts, data.source, strict=True)]
        used = [_large_enough(found, data.min_side) for found in sizes]
        left_out = len(source) - sum(map(len, used))
        if left_out:
            _log.warning(
                "left out %d of %d pictures, with a side of fewer than data.min_side=%d pixels",
                left_out,
                len(source),
                data.min_side,
            )
        if left_out == len(source):
            raise UserError(
                f"none of {left_out} pictures has sides of data.min_side={data.min_side} pixels; "
                "lower it"
            )
        aspects = [_log_aspects(found[some]) for found, some in zip(sizes, used, strict=True)]
        chosen = _assign(aspects, shapes, least)
    else:
        chosen = [np.zeros(len(some), np.int64) for some in used]
    buckets = []
    for number, size in enumerate(shapes):
        members = [
            some[which == number] + start
            for some, which, start in zip(used, chosen, starts, strict=False)
        ]
        if any(map(len, members)):
            buckets.append(Bucket(None if data.aspect == "square" else size, tuple(members)))
    return buckets


def _sizes(part: Source, name: str, data: DataConfig) -> np.ndarray:
    """int32 [n, 2]: the sizes of a source's pictures. Raises UserError if all have one size."""
    if not isinstance(part, PictureSource):
        what = "data.aspect=buckets" if data.aspect == "buckets" else "data.min_side"
        raise UserError(
            f"{what} is for pictures of any size; those of {name} have one: leave it out"
        )
    return part.sizes()


def _large_enough(sizes: np.ndarray, least: int) -> np.ndarray:
    """int64 [m]: the indices of pictures with no side below `least`.

    Bad pictures are among them, so that they are counted when they are read.
    """
    known = (sizes != UNKNOWN_SIZE).all(1)
    return np.flatnonzero(~known | (sizes.min(1, initial=2**30) >= least))


def _log_aspects(sizes: np.ndarray) -> np.ndarray:
    """float64 [n]: log(height / width), 0 for a picture of unknown size."""
    height, width = np.maximum(sizes, 1).T
    return np.log(height / width)


def _assign(
    aspects: Sequence[np.ndarray], shapes: Sequence[tuple[int, int]], least: int
) -> list[np.ndarray]:
    """The number of the bucket nearest in log aspect, int64 [n], for each array of log aspects.

    Buckets with fewer than `least` pictures are dissolved, the emptiest first.
    """
    centres = np.log([height / width for height, width in shapes])
    used = np.arange(len(shapes))
    while True:
        # In the middle between neighbours.
        borders = (centres[used][1:] + centres[used][:-1]) / 2
        chosen = [used[np.searchsorted(borders, each)] for each in aspects]
        counts = np.bincount(np.concatenate(chosen), minlength=len(shapes))[used]
        if len(used) == 1 or counts.min() >= least:
            return chosen
        used = np.delete(used, counts.argmin())
