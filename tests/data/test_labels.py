"""Labels of patches: what lies there, as the picture shows it; and where they are asked for."""

import numpy as np
import pytest

from taca_jax.data.config import DataConfig
from taca_jax.data.loader import make_loader
from taca_jax.data.shapes.captions import (
    COLORS,
    MAX_TOKENS,
    RELATIONS,
    SAID_TEXTURES,
    SHAPES,
    parse_caption,
)
from taca_jax.data.shapes.drawing import BACKGROUND, draw
from taca_jax.data.shapes.examples import GeneratedShapes, random_prompts, random_scene
from taca_jax.data.shapes.labels import (
    BACKGROUND_LABEL,
    CLASSES,
    LABELLED,
    NO_PHRASE,
    label_patches,
    label_words,
)
from taca_jax.data.sources.factory import open_source


def drawn_pixels(item):
    """bool [40, 40]: where an object shows in a picture of it alone."""
    return (draw([item]) != BACKGROUND).any(axis=-1)


@pytest.mark.parametrize("patch", [4, 8])
def test_a_patch_has_the_words_of_the_object_that_shows_most_in_it(patch):
    side = 40 // patch
    for index in range(60):
        placed = random_scene("train", 8, index).placed
        labels = label_patches(placed, patch)
        assert (labels.dtype, labels.shape) == (np.uint8, (side, side, 3))
        pixels = np.array([drawn_pixels(item) for item in placed])
        for row, column in np.ndindex(side, side):
            rows, columns = (slice(patch * i, patch * (i + 1)) for i in (row, column))
            shown = pixels[:, rows, columns].sum(axis=(1, 2))
            label = labels[row, column]
            if not shown.any():
                assert (label == BACKGROUND_LABEL).all()
                continue
            thing = placed[int(shown.argmax())].object
            words = [known[i - 1] for known, i in zip(LABELLED, label, strict=True)]
            assert words == [thing.color, thing.shape, thing.texture]


def test_every_label_occurs_and_none_is_beyond_its_classes():
    source = GeneratedShapes("train", 300, patch=4)
    labels = np.concatenate([example["labels"].reshape(-1, 3) for example in source])
    assert [set(column) for column in labels.T] == [set(range(count)) for count in CLASSES]


def test_patches_divide_the_picture():
    with pytest.raises(ValueError, match="patches of 16 pixels do not divide 40"):
        label_patches(random_scene("train", 0, 0).placed, 16)


def test_labels_change_nothing_else_and_come_where_they_are_asked_for():
    data = DataConfig("generated:shapes/5")
    labelled, plain = open_source(data, patch=4)[3], open_source(data)[3]
    np.testing.assert_array_equal(labelled.pop("image"), plain.pop("image"))
    assert labelled.pop("labels").shape == (10, 10, 3)
    assert labelled == plain


def test_a_batch_has_the_labels_of_its_pictures():
    sources = ("generated:shapes/8#color", "generated:shapes/8#spatial")
    data = DataConfig(sources, batch_size=4, weights=(1.0, 3.0))
    source = open_source(data, patch=8)
    by_id = {source[i]["id"]: source[i]["labels"] for i in range(len(source))}
    with make_loader(source, data=data, tokenize=lambda texts: np.zeros((len(texts), 1))) as loader:
        batch = next(loader)
    assert batch["labels"].shape == (4, 5, 5, 3)
    for name, labels in zip(batch["id"], batch["labels"], strict=True):
        np.testing.assert_array_equal(labels, by_id[name])


def test_every_word_has_the_labels_of_its_phrase():
    caption = "two striped red circles and a square"
    labels = label_words(parse_caption(caption))
    striped_red_circles = (
        1 + COLORS.index("red"),
        1 + SHAPES.index("circle"),
        1 + SAID_TEXTURES.index("striped"),
        2,
    )
    assert (labels[:4] == striped_red_circles).all()
    assert (labels[4] == NO_PHRASE).all()  # "and"
    assert (labels[5:7] == (0, 1 + SHAPES.index("square"), 0, 0)).all()
    assert (labels[7:] == NO_PHRASE).all()  # the end and padding


@pytest.mark.parametrize("split", ["train", "test"])
def test_labelled_words_are_those_of_phrases(split):
    joins = {"and", "of", *RELATIONS}
    for _, caption in random_prompts(split, 10, seed=0):
        labels = label_words(parse_caption(caption))
        words = caption.split()
        said = [word not in joins for word in words] + [False] * (MAX_TOKENS - len(words))
        np.testing.assert_array_equal(labels[:, 0] != NO_PHRASE, said)
        for word, label in zip(words, labels, strict=False):
            if word in COLORS:
                assert COLORS[label[0] - 1] == word
