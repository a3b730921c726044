"""Labels for supervised features: what each patch of a picture shows, and what its caption says of
the object to which each word belongs."""

from collections.abc import Sequence

import numpy as np

from taca_jax.data.shapes.captions import (
    COLORS,
    COUNTS,
    MAX_TOKENS,
    PLAIN,
    SAID_TEXTURES,
    SHAPES,
    Description,
    Phrase,
)
from taca_jax.data.shapes.drawing import IMAGE_SIZE, Placed, shape_mask

LABELLED = (COLORS, SHAPES, (PLAIN, *SAID_TEXTURES))
"""The words that each of a patch's labels chooses from: colours, shapes, textures."""

BACKGROUND_LABEL = 0
"""The label of a patch without an object; word i of LABELLED is label i + 1."""

CLASSES = tuple(1 + len(words) for words in LABELLED)
"""How many values each of a patch's labels has."""


def label_patches(placed: Sequence[Placed], patch: int) -> np.ndarray:
    """uint8 [40 / patch, 40 / patch, 3]: colour, shape and texture of the object that covers most
    of each square of `patch` pixels a side.

    Raises ValueError if the picture's 40 pixels are no multiple of `patch`.
    """
    side, rest = divmod(IMAGE_SIZE, patch)
    if rest:
        raise ValueError(f"patches of {patch} pixels do not divide {IMAGE_SIZE} pixels")
    covered = np.zeros((len(placed), IMAGE_SIZE, IMAGE_SIZE), bool)
    labels = np.empty((len(placed), len(LABELLED)), np.uint8)
    for number, item in enumerate(placed):
        thing, size = item.object, item.size
        box = slice(item.y, item.y + size), slice(item.x, item.x + size)
        covered[number][box] = shape_mask(thing.shape, size)
        words = (thing.color, thing.shape, thing.texture)
        labels[number] = [
            known.index(word) + 1 for known, word in zip(LABELLED, words, strict=True)
        ]
    area = covered.reshape(-1, side, patch, side, patch).sum(axis=(2, 4))
    return np.where(area.any(axis=0)[..., None], labels[area.argmax(axis=0)], BACKGROUND_LABEL)


WORD_CLASSES = (
    1 + len(COLORS),
    1 + len(SHAPES),
    1 + len(SAID_TEXTURES),
    1 + len(COUNTS),
)
"""How many values each label of a word has: colour, shape, texture and count; 0 is not said."""

NO_PHRASE = 255
"""All labels of a token that belongs to no phrase: "and", a relation, the end, padding."""


def label_words(description: Description) -> np.ndarray:
    """uint8 [16, 4]: colour, shape, texture and count of the phrase that each word of the caption
    belongs to; of "a red circle" all three words have the labels of red, circle and no texture."""
    labels = np.full((MAX_TOKENS, len(WORD_CLASSES)), NO_PHRASE, np.uint8)
    at = 0
    for phrase, joined in zip(description.phrases, description.joins, strict=True):
        at += len(joined)
        words = len(phrase.words())
        labels[at : at + words] = _phrase_labels(phrase)
        at += words
    return labels


def _phrase_labels(phrase: Phrase) -> tuple[int, int, int, int]:
    def label(words: Sequence[str], word: str | None) -> int:
        return 0 if word is None else words.index(word) + 1

    thing = phrase.object
    return (
        label(COLORS, thing.color),
        label(SHAPES, thing.shape),
        label(SAID_TEXTURES, thing.texture),
        phrase.count or 0,
    )
