"""Recognises the objects in a picture of shapes, and checks a caption's claims against them.

A picture is segmented by distance from the background and by hue. Shapes are matched with templates
from the drawing code by intersection over union, textures by correlation with their pattern at
every phase. Pictures from the drawing code are recognised without an error.

As in T2I-CompBench, only what the caption names is judged: further objects do not make a picture
wrong, but a `Verdict` counts them. "a red circle" holds if there is at least one, "two red circles"
if there are exactly two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from taca_jax.data.shapes.captions import (
    SAID_TEXTURES,
    SHAPES,
    Claim,
    Count,
    Description,
    Object,
    Present,
    Relation,
    parse_caption,
)
from taca_jax.data.shapes.drawing import (
    BACKGROUND,
    PALETTE,
    TEXTURE_PERIOD,
    shape_mask,
    texture_tile,
)

MIN_AREA = 30  # pixels; the smallest drawn object has 80
MIN_IOU = 0.75  # below it the shape is unknown
MAX_ASPECT = 1.5
MIN_DISTANCE = 80  # from the background, in RGB; that of the palest colour is 163
MIN_CONTRAST = 0.1  # of a texture, relative to the colour; drawn: 0.55
MIN_CORRELATION = 0.6  # of a texture with its pattern
MIN_SPREAD = 0.02  # share(1 - share) of dark pixels in a pattern; one with less fits by chance
MAX_PLAIN_DEVIATION = 0.2  # of the shade within a plain object; a drawn texture has 0.24

_COLORS = tuple(PALETTE)
_RGB = np.array([PALETTE[color] for color in _COLORS], np.float32)
_CHROMA = _RGB - _RGB.mean(axis=1, keepdims=True)
_HUES = _CHROMA / np.linalg.norm(_CHROMA, axis=1, keepdims=True)
_FOUR_NEIGHBOURS = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object that was recognised in a picture; shape and texture are None if unknown."""

    color: str
    shape: str | None
    texture: str | None
    center: tuple[float, float]  # x, y in pixels, of the box
    box: tuple[int, int, int, int]  # x, y, width, height in pixels
    confidence: float  # intersection over union with the best template, 0..1

    def is_a(self, thing: Object) -> bool:
        """Whether this object fits a caption's description of one."""
        return (
            self.shape == thing.shape
            and thing.color in (None, self.color)
            and thing.texture in (None, self.texture)
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a picture shows of what its caption claims."""

    claims: tuple[tuple[Claim, bool], ...]  # each claim, and whether it holds
    found: tuple[FoundObject, ...]
    extras: int  # objects beyond those that the caption names

    @property
    def correct(self) -> bool:
        """Whether all claims hold."""
        return all(holds for _, holds in self.claims)

    @property
    def exact(self) -> bool:
        """Whether all claims hold and there are no other objects."""
        return self.correct and not self.extras


def check(description: str | Description, image: np.ndarray) -> Verdict:
    """Checks which claims of a caption hold in an image, uint8 [height, width, 3].

    Raises UserError for a caption that is not of the shapes language.
    """
    if isinstance(description, str):
        description = parse_caption(description)
    return judge(description, read_scene(image))


def judge(description: Description, objects: Sequence[FoundObject]) -> Verdict:
    """Checks which claims of a description hold for the objects of a picture."""
    found = tuple(objects)
    return Verdict(
        tuple((claim, _holds(claim, found)) for claim in description.claims),
        found,
        _extras(description, found),
    )


def read_scene(image: np.ndarray) -> list[FoundObject]:
    """The objects in an image, uint8 [height, width, 3], by colour and then from top to bottom.

    Raises ValueError for an array of another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}; expected uint8 [height, width, 3]"
        )
    # With a border of background, so that every object is surrounded by pixels.
    pixels = np.full((image.shape[0] + 2, image.shape[1] + 2, 3), BACKGROUND, np.float32)
    pixels[1:-1, 1:-1] = image
    brightness = pixels.mean(axis=2)
    chroma = pixels - brightness[..., None]
    foreground = ((pixels - BACKGROUND) ** 2).sum(axis=2) > MIN_DISTANCE**2
    # Averaged over neighbours, because the hue of a single dark pixel is mostly noise.
    near = ndimage.uniform_filter(chroma * foreground[..., None], size=3, axes=(0, 1))
    hue = np.where(foreground, (near @ _HUES.T).argmax(axis=2), -1)
    objects = []
    for color, area in enumerate(np.bincount(hue[foreground], minlength=len(_COLORS))):
        if area < MIN_AREA:
            continue
        coverage = _coverage(color, chroma, brightness)
        labels = np.empty(hue.shape, np.int32)
        ndimage.label((hue == color) & (coverage > 0.5), _FOUR_NEIGHBOURS, output=labels)
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            top, left = rows.start - 1, columns.start - 1
            box = slice(top, rows.stop + 1), slice(left, columns.stop + 1)
            mask = labels[box] == label
            if np.count_nonzero(mask) >= MIN_AREA:
                # `left` and `top` include the border, and are one pixel before the object: as the
                # two offsets cancel, they are its position in the image.
                objects.append(_read_object(color, mask, coverage[box], pixels[box], (left, top)))
    return objects


def _read_object(
    color: int,
    mask: np.ndarray,
    coverage: np.ndarray,
    pixels: np.ndarray,
    corner: tuple[int, int],
) -> FoundObject:
    """The object with this mask, whose box is at `corner`, (x, y). The arrays include a border of
    one pixel around the box."""
    left, top = corner
    height, width = mask.shape[0] - 2, mask.shape[1] - 2
    shape, confidence = _read_shape(mask, coverage)
    return FoundObject(
        _COLORS[color],
        shape,
        _read_texture(color, mask, pixels),
        (left + width / 2, top + height / 2),
        (left, top, width, height),
        confidence,
    )


def _coverage(color: int, chroma: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    """float32 [height, width]: how much of each pixel an object of a colour covers, about 0..1.

    pixel = (1 - coverage) * background + coverage * shade * colour. As the background is grey, the
    chroma gives coverage * shade, and the rest of the brightness is the background's.
    """
    shade = chroma @ _CHROMA[color] / (_CHROMA[color] @ _CHROMA[color])
    return 1 - (brightness - shade * _RGB[color].mean()) / BACKGROUND


def _read_shape(mask: np.ndarray, coverage: np.ndarray) -> tuple[str | None, float]:
    """The best-fitting shape (None if none fits), and its intersection over union with the mask.

    It is chosen by coverage, because blurring preserves the sum of coverage.
    """
    height, width = mask.shape[0] - 2, mask.shape[1] - 2
    if max(height, width) > MAX_ASPECT * min(height, width):
        return None, 0.0
    near = mask.copy()
    near[1:] |= mask[:-1]
    near[:-1] |= mask[1:]
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    soft = (np.clip(coverage, 0, 1) * near).ravel()
    templates, areas = _templates(height, width)
    overlap = templates @ soft
    best = int((overlap / (areas + soft.sum() - overlap)).argmax())
    common = float(templates[best] @ mask.ravel())
    confidence = common / (float(areas[best]) + np.count_nonzero(mask) - common)
    shape = SHAPES[best * len(SHAPES) // len(areas)]
    return (shape if confidence >= MIN_IOU else None), confidence


@lru_cache(maxsize=256)
def _templates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks of each shape in every box within a pixel of the given one, and their areas.

    Masks are float32 [n, pixels of the box with a border of a pixel], areas float32 [n]. There are
    as many of each shape, one shape after the other.
    """
    rows = _spans(height)
    columns = _spans(width)
    templates = np.zeros((len(SHAPES), len(rows), len(columns), height + 2, width + 2), np.float32)
    for s, shape in enumerate(SHAPES):
        for r, (top, high) in enumerate(rows):
            for c, (left, wide) in enumerate(columns):
                templates[s, r, c, top : top + high, left : left + wide] = shape_mask(
                    shape, high, wide
                )
    templates = templates.reshape(-1, (height + 2) * (width + 2))
    return templates, templates.sum(axis=1)


def _spans(length: int) -> list[tuple[int, int]]:
    """(start, length) of all spans in `length` + 2 pixels with a length within 1 of `length`."""
    return [
        (start, span)
        for span in (length - 1, length, length + 1)
        for start in range(length + 2 - span + 1)
    ]


def _read_texture(color: int, mask: np.ndarray, pixels: np.ndarray) -> str | None:
    """The texture, None if unknown.

    It is read from the pixels inside the outline, where blurring does not mix in the background.
    """
    inside = np.zeros(mask.shape, np.float32)
    inside[1:-1, 1:-1] = (
        mask[1:-1, 1:-1] & mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
    )
    inside = inside.ravel()
    count = inside.sum()
    if count < MIN_AREA / 2:
        return None
    shade = (pixels @ _RGB[color]).ravel() / (_RGB[color] @ _RGB[color])
    shade = (shade - shade @ inside / count) * inside
    deviation = np.sqrt(shade @ shade / count)
    patterns = _patterns(*mask.shape)
    share = patterns @ inside / count
    spread = share * (1 - share)
    contrast = -(patterns @ shade) / count / np.maximum(spread, 1e-6)
    contrast = np.where(spread > MIN_SPREAD, contrast, 0)
    correlation = contrast * np.sqrt(spread) / max(deviation, 1e-6)
    best = int(correlation.argmax())
    if contrast[best] >= MIN_CONTRAST and correlation[best] >= MIN_CORRELATION:
        return _PATTERNS[best][0]
    return "plain" if deviation <= MAX_PLAIN_DEVIATION else None


def _distinct_patterns() -> list[tuple[str, np.ndarray]]:
    """The textures at every phase, each with a tile, bool [4, 4], that is True where it is dark."""
    patterns: dict[bytes, tuple[str, np.ndarray]] = {}
    for texture in SAID_TEXTURES:
        for dy in range(TEXTURE_PERIOD):
            for dx in range(TEXTURE_PERIOD):
                tile = np.roll(texture_tile(texture), (dy, dx), axis=(0, 1))
                patterns.setdefault(tile.tobytes(), (texture, tile))
    return list(patterns.values())


_PATTERNS = _distinct_patterns()


@lru_cache(maxsize=256)
def _patterns(height: int, width: int) -> np.ndarray:
    """float32 [n, height * width]: 1 where a pattern of `_PATTERNS` is dark."""
    repeats = (-(-height // TEXTURE_PERIOD), -(-width // TEXTURE_PERIOD))
    return np.stack(
        [np.tile(tile, repeats)[:height, :width].ravel() for _, tile in _PATTERNS]
    ).astype(np.float32)


def _holds(claim: Claim, found: tuple[FoundObject, ...]) -> bool:
    match claim:
        case Present(thing):
            return any(item.is_a(thing) for item in found)
        case Count(thing, count):
            return sum(item.is_a(thing) for item in found) == count
        case Relation(subject, relation, thing):
            return any(
                _lies(first.center, relation, second.center)
                for first in found
                if first.is_a(subject)
                for second in found
                if second is not first and second.is_a(thing)
            )


def _lies(first: tuple[float, float], relation: str, second: tuple[float, float]) -> bool:
    """Whether `relation` holds: the centres are in that order, and farther apart along its axis
    than across it."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    if relation in ("right", "below"):
        along = -along
    return along > abs(across)


def _extras(description: Description, found: tuple[FoundObject, ...]) -> int:
    """How many objects fit no phrase, or exceed the count of the phrase that they fit."""
    phrases = description.phrases
    extras = sum(not any(item.is_a(phrase.object) for phrase in phrases) for item in found)
    for phrase in phrases:
        extras += max(0, sum(item.is_a(phrase.object) for item in found) - (phrase.count or 1))
    return extras
