"""Draws coloured, textured shapes on a grey background, without anti-aliasing.

Positions and cells of textures are multiples of two pixels, which leaves few distinct patches of
4 x 4 pixels, so that a very small model can learn to draw them. A texture alternates a colour with
a darker shade of the same hue, so that a picture can be segmented by hue alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TypeVar

import numpy as np

from taca_jax.data.shapes.captions import RELATIONS, Object

T = TypeVar("T")

IMAGE_SIZE = 40  # pixels a side, as all lengths
OBJECT_SIZES = (12, 14)
GAP = 2  # least distance between two objects
MARGIN = 2  # least distance from the border
STEP = 2  # positions are multiples of this
BACKGROUND = 216  # of 255, in all channels
DARK = 0.45  # brightness of a texture's second shade, relative to the first
TEXTURE_PERIOD = 4

_MAX_TRIES = 10_000  # to place the objects of a picture
_BOX_TRIES = 10  # to place one of them before all are placed anew

PALETTE = {
    "red": (225, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 200, 30),
    "cyan": (40, 195, 205),
    "purple": (170, 60, 200),
}


@dataclass(frozen=True, slots=True)
class Placed:
    """An object with every attribute set, in the box [x, x + size) x [y, y + size), in pixels."""

    object: Object
    x: int
    y: int
    size: int


@cache
def shape_mask(shape: str, height: int, width: int | None = None) -> np.ndarray:
    """bool [height, width]: the pixels of a shape that fills its box, by default a square."""
    width = width or height
    v = ((np.arange(height) + 0.5) / height * 2 - 1)[:, None]
    u = ((np.arange(width) + 0.5) / width * 2 - 1)[None, :]
    tolerance = 1e-6
    if shape == "circle":
        mask = u**2 + v**2 <= 1 + tolerance
    elif shape == "square":
        mask = np.ones((height, width), bool)
    elif shape == "triangle":
        mask = np.abs(u) <= (v + 1) / 2 + 1 / width + tolerance
    elif shape == "cross":
        mask = (np.abs(u) <= 0.4) | (np.abs(v) <= 0.4)
    elif shape == "diamond":
        mask = np.abs(u) + np.abs(v) <= 1 + tolerance
    else:
        raise ValueError(f"shape {shape!r} is not known")
    mask = np.array(np.broadcast_to(mask, (height, width)))
    mask.flags.writeable = False
    return mask


@cache
def texture_tile(texture: str) -> np.ndarray:
    """bool [4, 4]: where one period of a texture is dark."""
    rows, columns = np.indices((TEXTURE_PERIOD, TEXTURE_PERIOD)) // 2 % 2 == 1
    if texture == "plain":
        return np.zeros_like(rows)
    if texture == "striped":
        return rows
    if texture == "dotted":
        return rows & columns
    if texture == "checkered":
        return rows ^ columns
    raise ValueError(f"texture {texture!r} is not known")


@cache
def sprite(shape: str, color: str, texture: str, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: one object on the background."""
    repeats = -(-size // TEXTURE_PERIOD)
    dark = np.tile(texture_tile(texture), (repeats, repeats))[:size, :size]
    shade = np.where(dark, DARK, 1.0)[..., None]
    colored = np.round(shade * np.array(PALETTE[color])).astype(np.uint8)
    image = np.where(shape_mask(shape, size)[..., None], colored, np.uint8(BACKGROUND))
    image.flags.writeable = False
    return image


_EMPTY = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, np.uint8)


def draw(placed: Sequence[Placed]) -> np.ndarray:
    """uint8 [40, 40, 3]: the picture of objects whose boxes do not overlap."""
    image = _EMPTY.copy()
    for item in placed:
        thing = item.object
        if thing.color is None or thing.texture is None:
            raise ValueError(f"cannot draw {thing}: its color and texture must be set")
        image[item.y : item.y + item.size, item.x : item.x + item.size] = sprite(
            thing.shape, thing.color, thing.texture, item.size
        )
    return image


def place(objects: Sequence[Object], relation: str | None, random: Random) -> list[Placed]:
    """The objects at random places, apart from each other.

    `relation` (None: any) holds clearly between the first two, see `_related`. Raises ValueError
    for an unknown relation, and for objects that have no room.
    """
    if relation is not None and relation not in RELATIONS:
        raise ValueError(f"relation {relation!r} is not one of {RELATIONS}")
    tries = 0
    while True:
        tries += 1
        if tries > _MAX_TRIES:
            raise ValueError(f"{len(objects)} objects do not fit a picture of {IMAGE_SIZE} pixels")
        boxes: list[tuple[int, int, int]] = []
        for _ in objects:
            box = _free_box(boxes, random)
            if box is None:
                break
            boxes.append(box)
            if (
                len(boxes) == 2
                and relation is not None
                and not _related(boxes[0], boxes[1], relation)
            ):
                break
        else:
            return [Placed(o, x, y, size) for o, (x, y, size) in zip(objects, boxes, strict=True)]


def pick(items: Sequence[T], random: Random) -> T:
    """A random item, by `Random.random` alone, which gives the same in every version of Python."""
    return items[int(random.random() * len(items))]


def _free_box(taken: list[tuple[int, int, int]], random: Random) -> tuple[int, int, int] | None:
    """(x, y, size) of a random box that keeps GAP from those `taken`; None if none was found."""
    for _ in range(_BOX_TRIES):
        size = OBJECT_SIZES[int(random.random() * len(OBJECT_SIZES))]
        places = (IMAGE_SIZE - 2 * MARGIN - size) // STEP + 1
        x = MARGIN + STEP * int(random.random() * places)
        y = MARGIN + STEP * int(random.random() * places)
        for u, v, other in taken:
            if (
                x - u < other + GAP
                and u - x < size + GAP
                and y - v < other + GAP
                and v - y < size + GAP
            ):
                break
        else:
            return x, y, size
    return None


def _related(first: tuple[int, int, int], second: tuple[int, int, int], relation: str) -> bool:
    """Whether `relation` holds, with boxes at least twice as far apart along its axis as across."""
    dx = second[0] - first[0] + (second[2] - first[2]) / 2
    dy = second[1] - first[1] + (second[2] - first[2]) / 2
    if relation in ("right", "below"):
        dx, dy = -dx, -dy
    return dx >= 2 * abs(dy) if relation in ("left", "right") else dy >= 2 * abs(dx)
