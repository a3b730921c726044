"""Random examples of the shapes data, drawn on demand: index -> picture, caption, category, id.

The splits `train` and `validation` have no held-out composition (`captions.held_out`), neither in
captions nor in pictures. Every caption of `test` has one of its category's own kind, and none of
another kind, so that a category measures one thing; captions of `complex` have any kinds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import NotRequired, TypedDict

import numpy as np

from taca_jax.data.shapes.captions import (
    CATEGORIES,
    COLORS,
    HELD_OUT_COLOR_SHAPES,
    PLAIN,
    RELATIONS,
    SAID_TEXTURES,
    SHAPES,
    Description,
    Object,
    Phrase,
    held_out,
)
from taca_jax.data.shapes.drawing import Placed, draw, pick, place
from taca_jax.data.shapes.labels import label_patches

SPLITS = ("train", "validation", "test")
MAX_OBJECTS = 4
_MISSES = 2000  # captions drawn in a row without a new one mean that there is none
_SINGLE = 0.25  # share of captions with one object, in categories and splits that have such


class Example(TypedDict):
    image: np.ndarray  # uint8 [40, 40, 3]
    caption: str
    category: str
    id: str
    labels: NotRequired[np.ndarray]  # as from `label_patches`, with GeneratedShapes.patch


_SEEN_COLORS = {
    shape: tuple(color for color in COLORS if (color, shape) not in HELD_OUT_COLOR_SHAPES)
    for shape in SHAPES
}


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture before it is drawn, with its description."""

    category: str
    description: Description
    placed: tuple[Placed, ...]


@dataclass(frozen=True)
class GeneratedShapes:
    """`size` examples of a split, by index; the seed and the index decide each.

    category: of every example; None draws all categories equally often. patch: pixels per side of
    the patches whose labels each example has; None leaves labels out. Raises ValueError for an
    unknown split or category.
    """

    split: str
    size: int
    seed: int = 0
    category: str | None = None
    patch: int | None = None

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r} is not one of {', '.join(SPLITS)}")
        if self.category not in (None, *CATEGORIES):
            raise ValueError(f"category {self.category!r} is not one of {', '.join(CATEGORIES)}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is not in 0..{self.size - 1}")
        scene = random_scene(self.split, self.seed, index, self.category)
        drawn_from = self.split if self.category is None else f"{self.split}-{self.category}"
        example: Example = {
            "image": draw(scene.placed),
            "caption": scene.description.caption,
            "category": scene.category,
            "id": f"{drawn_from}-{self.seed}-{index:06d}",
        }
        if self.patch is not None:
            example["labels"] = label_patches(scene.placed, self.patch)
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(self.size))


def random_scene(split: str, seed: int, index: int, category: str | None = None) -> Scene:
    """The scene of a category that a split, a seed and an index decide; without a category all are
    equally frequent."""
    random = Random((SPLITS.index(split) << 96) + (seed << 48) + index)
    category = category or pick(CATEGORIES, random)
    description = random_description(category, split, random)
    objects = _complete(description, random)
    return Scene(category, description, tuple(place(objects, description.relation, random)))


def random_description(category: str, split: str, random: Random) -> Description:
    """A description of a category that belongs to a split."""
    make = _MAKERS[category]
    while True:
        description = make(random, single=split != "test")
        if _belongs(held_out(description), category, split):
            return description


def random_prompts(split: str, n_per_category: int, seed: int) -> list[tuple[str, str]]:
    """(category, caption) pairs of a split, all distinct: `n_per_category` of each category in
    turn, or all that there are. The test split has 40 of `shape`, 50 of `texture`, 144 of `color`;
    the train split 45 of `shape`.
    """
    prompts = []
    for number, category in enumerate(CATEGORIES):
        random = Random((seed << 8) + number)
        distinct: dict[str, None] = {}
        misses = 0
        while len(distinct) < n_per_category and misses < _MISSES:
            before = len(distinct)
            distinct[random_description(category, split, random).caption] = None
            misses = 0 if len(distinct) > before else misses + 1
        prompts += [(category, caption) for caption in distinct]
    return prompts


def _belongs(kinds: frozenset[str], category: str, split: str) -> bool:
    """Whether a description with these kinds of held-out compositions may be in a split."""
    if split != "test":
        return not kinds
    return bool(kinds) if category == "complex" else kinds == {category}


def _complete(description: Description, random: Random) -> list[Object]:
    """The objects to draw: open textures become plain, open colours random ones."""
    objects = []
    used = {phrase.object.color for phrase in description.phrases}
    for phrase in description.phrases:
        for _ in range(phrase.count or 1):
            thing = phrase.object
            color = thing.color
            if color is None:
                seen = _SEEN_COLORS[thing.shape]
                color = pick([c for c in seen if c not in used] or seen, random)
                used.add(color)
            objects.append(replace(thing, color=color, texture=thing.texture or PLAIN))
    return objects


def _sample(items: tuple[str, ...], count: int, random: Random) -> list[str]:
    """`count` distinct items in random order."""
    left = list(items)
    return [left.pop(int(random.random() * len(left))) for _ in range(count)]


def _phrases(
    count: int, random: Random, *, colors: bool = False, textures: int = 0
) -> tuple[Phrase, ...]:
    """`count` phrases of distinct shapes, with distinct colours if `colors`.

    The first `textures` of them have distinct textures.
    """
    shapes = _sample(SHAPES, count, random)
    said = [*_sample(COLORS, count, random)] if colors else [None] * count
    texture = [*_sample(SAID_TEXTURES, textures, random), *[None] * (count - textures)]
    return tuple(Phrase(Object(*words)) for words in zip(shapes, said, texture, strict=True))


def _color(random: Random, *, single: bool) -> Description:
    count = 1 if single and random.random() < _SINGLE else 2
    return Description(_phrases(count, random, colors=True))


def _shape(random: Random, *, single: bool) -> Description:
    if single and random.random() < _SINGLE:
        return Description(_phrases(1, random))
    return Description(_phrases(2 if random.random() < 0.5 else 3, random))


def _texture(random: Random, *, single: bool) -> Description:
    """Both objects are textured, or one is, and the other plain, which the caption does not say."""
    if single and random.random() < _SINGLE:
        return Description(_phrases(1, random, textures=1))
    phrases = _phrases(2, random, textures=2 if random.random() < 0.7 else 1)
    return Description(phrases if random.random() < 0.5 else phrases[::-1])


def _spatial(random: Random, *, single: bool) -> Description:
    del single
    return Description(_phrases(2, random, colors=random.random() < 0.7), pick(RELATIONS, random))


def _numeracy(random: Random, *, single: bool) -> Description:
    """Up to four objects, of one kind, or of two kinds with several of one at least."""
    if random.random() < 0.5:
        (phrase,) = _phrases(1, random, colors=True)
        return Description((replace(phrase, count=1 + int(random.random() * MAX_OBJECTS)),))
    first, second = pick(((1, 2), (2, 1), (2, 2), (1, 3), (3, 1)), random)
    one, other = _phrases(2, random, colors=True)
    return Description((replace(one, count=first), replace(other, count=second)))


def _complex(random: Random, *, single: bool) -> Description:
    """Coloured objects, at least one of them textured, with a relation between the first two."""
    del single
    count = 2 if random.random() < 0.5 else 3
    textures = 1 + int(random.random() * count)
    phrases = _phrases(count, random, colors=True, textures=textures)
    if random.random() < 0.5:
        phrases = phrases[::-1]
    return Description(phrases, pick(RELATIONS, random))


_MAKERS = {
    "color": _color,
    "shape": _shape,
    "texture": _texture,
    "spatial": _spatial,
    "numeracy": _numeracy,
    "complex": _complex,
}
