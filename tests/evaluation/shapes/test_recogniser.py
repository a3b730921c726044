"""The recogniser reads what the drawing code draws, and says no where a picture is wrong."""

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from scipy import ndimage

from taca_jax.data.shapes.captions import (
    COLORS,
    PLAIN,
    SAID_TEXTURES,
    SHAPES,
    Description,
    Object,
    Phrase,
)
from taca_jax.data.shapes.drawing import BACKGROUND, IMAGE_SIZE, Placed, draw
from taca_jax.data.shapes.examples import CATEGORIES, random_scene
from taca_jax.errors import UserError
from taca_jax.evaluation.shapes.recogniser import check, read_scene

SCENES = 2400


@pytest.fixture(scope="module")
def scenes():
    return [random_scene(split, 21, i) for split in ("train", "test") for i in range(SCENES // 2)]


def drawn_objects(scene):
    return Counter(item.object for item in scene.placed)


def read_objects(image):
    return Counter(Object(o.shape or "none", o.color, o.texture) for o in read_scene(image))


def to_uint8(image):
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def noisy(image, rng, sigma):
    return to_uint8(image + rng.normal(0, sigma, image.shape))


def blurred(image):
    """Each pixel mixed with those one pixel away, by 1-2-1 along both axes."""
    kernel = np.array([1, 2, 1]) / 4
    rows = ndimage.convolve1d(image.astype(float), kernel, axis=0, mode="nearest")
    return to_uint8(ndimage.convolve1d(rows, kernel, axis=1, mode="nearest"))


def picture(*objects):
    """A picture of (shape, colour, texture, x, y) of 12 pixels each."""
    return draw([Placed(Object(s, c, t), x, y, 12) for s, c, t, x, y in objects])


def test_every_drawn_picture_is_read_without_an_error(scenes):
    for scene in scenes:
        image = draw(scene.placed)
        verdict = check(scene.description.caption, image)
        assert verdict.correct
        assert verdict.extras == 0
        assert read_objects(image) == drawn_objects(scene)
        boxes = {found.box for found in verdict.found}
        assert boxes == {(item.x, item.y, item.size, item.size) for item in scene.placed}
        assert all(found.confidence == 1 for found in verdict.found)


def test_every_kind_of_object_is_read():
    """All pairs, those held out of training too."""
    for shape in SHAPES:
        for color in COLORS:
            for texture in (PLAIN, *SAID_TEXTURES):
                for size in (10, 11, 12, 13, 14):
                    thing = Object(shape, color, texture)
                    image = draw([Placed(thing, 7, 11, size)])
                    assert read_objects(image) == Counter([thing]), (thing, size)


@pytest.mark.parametrize("sigma", [5, 10, 15])
def test_noise_does_not_matter(scenes, sigma):
    rng = np.random.default_rng(sigma)
    read = [
        read_objects(noisy(draw(scene.placed), rng, sigma)) == drawn_objects(scene)
        for scene in scenes[::3]
    ]
    assert np.mean(read) >= 0.99


def test_blur_does_not_matter(scenes):
    read = [
        read_objects(blurred(draw(scene.placed))) == drawn_objects(scene) for scene in scenes[::3]
    ]
    assert np.mean(read) >= 0.99


def test_blur_with_noise_hardly_matters(scenes):
    rng = np.random.default_rng(0)
    read = [
        read_objects(noisy(blurred(draw(scene.placed)), rng, 8)) == drawn_objects(scene)
        for scene in scenes[::3]
    ]
    assert np.mean(read) >= 0.99


def test_textures_are_read_at_every_phase():
    scene = [Placed(Object("square", "green", "dotted"), 8, 8, 14)]
    image = draw(scene)
    for dy in range(4):
        for dx in range(4):
            cut = np.full_like(image, BACKGROUND)
            cut[10:20, 10:20] = image[8 + dy : 18 + dy, 8 + dx : 18 + dx]
            (found,) = read_scene(cut)
            assert (found.shape, found.texture) == ("square", "dotted")


def test_captions_of_other_pictures_are_denied(scenes):
    """Whether a claim of another caption of its category holds, against what was drawn."""
    order = list(range(len(scenes)))
    Random(0).shuffle(order)
    wrong = {category: [] for category in CATEGORIES}
    for scene, other in zip(scenes, (scenes[i] for i in order), strict=True):
        verdict = check(other.description, draw(scene.placed))
        drawn = [item.object for item in scene.placed]
        for phrase, (_, holds) in zip(other.description.phrases, verdict.claims, strict=False):
            matching = sum(phrase.object.matches(thing) for thing in drawn)
            expected = matching > 0 if phrase.count is None else matching == phrase.count
            assert holds == expected
        if other.description.caption != scene.description.caption:
            wrong[other.category].append(verdict.correct)
    # Rarely another picture satisfies a caption, and often where it says as little as "a cross".
    for category, correct in wrong.items():
        assert np.mean(correct) < (0.2 if category == "shape" else 0.05), category


def corrupted(description, random):
    """The description with one attribute, count or relation changed, and what was changed."""
    changes = {}
    phrase = description.phrases[0]
    for name, known in (("color", COLORS), ("texture", SAID_TEXTURES)):
        old = getattr(phrase.object, name)
        if old is not None:
            new = random.choice([value for value in known if value != old])
            changes[name] = replace(phrase, object=replace(phrase.object, **{name: new}))
    used = {phrase.object.shape for phrase in description.phrases}
    new = random.choice([shape for shape in SHAPES if shape not in used])
    changes["shape"] = replace(phrase, object=replace(phrase.object, shape=new))
    if phrase.count is not None:
        changes["count"] = replace(phrase, count=phrase.count % 4 + 1)
    result = {
        name: Description((changed, *description.phrases[1:]), description.relation)
        for name, changed in changes.items()
    }
    if description.relation is not None:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        result["relation"] = replace(description, relation=opposite[description.relation])
    return result


def test_a_caption_with_one_word_changed_is_denied(scenes):
    random = Random(1)
    rng = np.random.default_rng(1)
    accepted = {}
    for scene in scenes:
        image = noisy(draw(scene.placed), rng, 8)
        for name, description in corrupted(scene.description, random).items():
            accepted.setdefault(name, []).append(check(description, image).correct)
    assert set(accepted) == {"color", "texture", "shape", "count", "relation"}
    for name, correct in accepted.items():
        assert len(correct) > 100
        assert np.mean(correct) < 0.01, name


def test_swapped_attributes_are_denied():
    caption = "a red circle and a blue square"
    right = picture(("circle", "red", "plain", 4, 4), ("square", "blue", "plain", 22, 22))
    swapped = picture(("circle", "blue", "plain", 4, 4), ("square", "red", "plain", 22, 22))
    assert [holds for _, holds in check(caption, right).claims] == [True, True]
    assert [holds for _, holds in check(caption, swapped).claims] == [False, False]


def test_relations_hold_along_the_longer_axis_alone():
    image = picture(("circle", "red", "plain", 2, 2), ("square", "blue", "plain", 24, 10))
    holds = {
        join: check(f"a circle {join} a square", image).correct
        for join in ("left of", "right of", "above", "below")
    }
    assert holds == {"left of": True, "right of": False, "above": False, "below": False}
    assert check("a square right of a circle", image).correct


def test_counts_are_exact_and_extras_are_counted():
    two = [("circle", "red", "plain", 4, 4), ("circle", "red", "plain", 22, 4)]
    square = ("square", "blue", "plain", 4, 22)
    assert check("two red circles", picture(*two)).correct
    assert not check("two red circles", picture(two[0])).correct
    assert not check("one red circle", picture(*two)).correct
    # "a" asks for at least one; more are extras, and so is what the caption does not name.
    present = check("a red circle", picture(*two, square))
    assert present.correct
    assert present.extras == 2
    counted = check("two red circles", picture(*two, square))
    assert counted.correct
    assert counted.extras == 1


def test_an_empty_or_meaningless_picture_satisfies_nothing():
    empty = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, np.uint8)
    assert read_scene(empty) == []
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, empty.shape, dtype=np.uint8)
    line = empty.copy()
    line[10:13, 2:38] = (225, 40, 40)
    for image in (empty, noise, line):
        for shape in SHAPES:
            assert not check(f"a {shape}", image).correct
    assert [found.shape for found in read_scene(line)] == [None]


def test_a_description_does_as_well_as_its_caption():
    image = picture(("cross", "cyan", "striped", 10, 10))
    description = Description((Phrase(Object("cross", "cyan", "striped")),))
    assert check(description, image) == check("a striped cyan cross", image)
    assert not check("a dotted cyan cross", image).correct


def test_unknown_words_and_other_arrays_are_refused():
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, np.uint8)
    with pytest.raises(UserError, match="'crimson' is not known"):
        check("a crimson circle", image)
    with pytest.raises(ValueError, match=r"float32 \[40, 40, 3\]; expected uint8"):
        read_scene(image.astype(np.float32))
