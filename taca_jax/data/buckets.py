"""Which pictures are used, and which size each is brought to."""

import logging
from collections.abc import Sequence

import numpy as np

from taca_jax.data.config import DataConfig
from taca_jax.data.order import Bucket
from taca_jax.data.sources.base import UNKNOWN, PictureSource, Source
from taca_jax.data.sources.opening import parts_of
from taca_jax.errors import UserError

_SIDES_PER_RESOLUTION = 16
"""Sides of buckets are a 16th of the resolution apart, or more where the model asks for more."""

_log = logging.getLogger(__name__)


def bucket_sizes(resolution: int, multiple: int, max_aspect: float) -> list[tuple[int, int]]:
    """(height, width) of rectangles of at most the area of a square of `resolution`, and near it.

    Sides are multiples of `multiple`; the longer is at most `max_aspect` of the shorter. The square
    is one of them. From the flattest to the tallest.
    """
    step = multiple * max(1, resolution // (_SIDES_PER_RESOLUTION * multiple))
    sizes = {(resolution, resolution)}
    for side in range(step, resolution, step):
        other = resolution**2 // side // step * step
        if other <= max_aspect * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def make_buckets(source: Source, data: DataConfig, *, multiple: int, least: int) -> list[Bucket]:
    """The buckets that the examples of `source` fall into, as `data.aspect` says.

    multiple: what the model's sides must be multiples of, in pixels. least: buckets with fewer
    examples are given up, and theirs fall into the nearest of the others.
    Raises UserError where no example is left, and for sources whose pictures have one size.
    """
    parts = parts_of(source)
    starts = np.cumsum([0, *map(len, parts)])
    kept = [np.arange(len(part)) for part in parts]
    if data.aspect == "square":
        side = data.resolution
        sizes, shapes = None, [(side, side)]
    else:
        shapes = bucket_sizes(data.resolution, multiple, data.max_aspect)
    if data.aspect == "buckets" or data.min_side:
        sizes = [_sizes(part, name, data) for part, name in zip(parts, data.source, strict=True)]
        kept = [_large_enough(found, data.min_side) for found in sizes]
        left_out = len(source) - sum(map(len, kept))
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
        aspects = [_aspects(found[keep]) for found, keep in zip(sizes, kept, strict=True)]
        chosen = _assign(aspects, shapes, least)
    else:
        chosen = [np.zeros(len(keep), np.int64) for keep in kept]
    buckets = []
    for number, size in enumerate(shapes):
        members = [
            keep[which == number] + start
            for keep, which, start in zip(kept, chosen, starts, strict=False)
        ]
        if any(map(len, members)):
            buckets.append(Bucket(None if data.aspect == "square" else size, tuple(members)))
    return buckets


def _sizes(part: Source, name: str, data: DataConfig) -> np.ndarray:
    if not isinstance(part, PictureSource):
        what = "data.aspect=buckets" if data.aspect == "buckets" else "data.min_side"
        raise UserError(
            f"{what} is for pictures of any size; those of {name} have one: leave it out"
        )
    return part.sizes()


def _large_enough(sizes: np.ndarray, least: int) -> np.ndarray:
    """Those that are bad stay: to be named when they are read."""
    known = (sizes != UNKNOWN).all(1)
    return np.flatnonzero(~known | (sizes.min(1, initial=2**30) >= least))


def _aspects(sizes: np.ndarray) -> np.ndarray:
    """log(height / width), 0 where it is not known."""
    height, width = np.maximum(sizes, 1).T
    return np.log(height / width)


def _assign(
    aspects: Sequence[np.ndarray], shapes: Sequence[tuple[int, int]], least: int
) -> list[np.ndarray]:
    """The number of the bucket nearest in aspect, of those that at least `least` fall into."""
    centres = np.log([height / width for height, width in shapes])
    used = np.arange(len(shapes))
    while True:
        # Between two neighbours the border is in the middle.
        borders = (centres[used][1:] + centres[used][:-1]) / 2
        chosen = [used[np.searchsorted(borders, each)] for each in aspects]
        counts = np.bincount(np.concatenate(chosen), minlength=len(shapes))[used]
        if len(used) == 1 or counts.min() >= least:
            return chosen
        used = np.delete(used, counts.argmin())
