"""The shapes data: captions, held-out compositions, pictures, and the data set on disk."""

import hashlib
import shutil
import subprocess
import sys
from collections import Counter
from itertools import combinations
from random import Random

import numpy as np
import pytest

from taca_jax.data.shapes import dataset
from taca_jax.data.shapes.captions import (
    CATEGORIES,
    COLORS,
    COUNTS,
    HELD_OUT_COLOR_SHAPES,
    HELD_OUT_COUNT_SHAPES,
    HELD_OUT_RELATIONS,
    HELD_OUT_SHAPE_PAIRS,
    HELD_OUT_TEXTURE_SHAPES,
    MAX_TOKENS,
    RELATIONS,
    SAID_TEXTURES,
    SHAPES,
    SPECIAL_TOKENS,
    VOCABULARY,
    Count,
    Description,
    Object,
    Phrase,
    Present,
    Relation,
    canonical_relation,
    held_out,
    parse_caption,
)
from taca_jax.data.shapes.dataset import load
from taca_jax.data.shapes.drawing import BACKGROUND, GAP, IMAGE_SIZE, MARGIN, PALETTE, place
from taca_jax.data.shapes.examples import (
    SPLITS,
    GeneratedShapes,
    random_prompts,
    random_scene,
)
from taca_jax.errors import UserError

SCENES = 3000


@pytest.fixture(scope="module")
def scenes():
    return {split: [random_scene(split, 11, i) for i in range(SCENES)] for split in SPLITS}


def every_pair_of_phrases():
    things = [
        Phrase(Object(shape, color, texture), count)
        for shape in SHAPES[:3]
        for color in (None, "red", "cyan")
        for texture in (None, "dotted")
        for count in (None, 1, 3)
    ]
    return [(a, b) for a in things for b in things]


def test_vocabulary_holds_each_word_once_after_the_special_tokens():
    assert VOCABULARY[:3] == SPECIAL_TOKENS == ("<pad>", "</s>", "<unk>")
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 33


def test_parsing_inverts_captions_of_every_split(scenes):
    for split in SPLITS:
        for scene in scenes[split]:
            assert parse_caption(scene.description.caption) == scene.description


def test_parsing_inverts_captions_that_no_split_has():
    for phrases in every_pair_of_phrases():
        assert parse_caption(Description(phrases).caption) == Description(phrases)
        if phrases[0].count is None and phrases[1].count is None:
            for relation in RELATIONS:
                description = Description(phrases, relation)
                assert parse_caption(description.caption) == description


def test_claims_of_captions():
    striped = Object("circle", "red", "striped")
    square = Object("square", "blue")
    assert parse_caption("A striped red circle left of a blue square and a cross").claims == (
        Present(striped),
        Present(square),
        Present(Object("cross")),
        Relation(striped, "left", square),
    )
    assert parse_caption("two blue squares and one cross").claims == (
        Count(square, 2),
        Count(Object("cross"), 1),
    )


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a crimson circle", "'crimson' is not known; known words: a and of one"),
        ("", "expected 'a' or one of one two three four but found 'the end'"),
        ("a red", "expected one of circle square triangle cross diamond but found 'the end'"),
        ("two circle", "but found 'circle'"),
        ("one circles", "but found 'circles'"),
        ("a red striped circle", "but found 'striped'"),
        ("a circle left a square", "expected 'and' or 'left of', 'right of', 'above', 'below'"),
        ("a circle and a square above a cross", "only stand between the first two"),
        ("two circles above a square", "without a count"),
        ("a circle and a square and a cross and a diamond", "after 3 objects"),
        ("a " * 16, "has 16 words; at most 15 fit"),
    ],
)
def test_captions_that_cannot_be_read_say_why(caption, message):
    with pytest.raises(UserError) as raised:
        parse_caption(caption)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_captions_fit_the_tokens(scenes):
    known = set(VOCABULARY)
    longest = 0
    for split in SPLITS:
        for scene in scenes[split]:
            words = scene.description.caption.split()
            assert known.issuperset(words)
            longest = max(longest, len(words) + 1)
    assert longest == MAX_TOKENS == 16


def test_a_fifth_or_a_sixth_of_each_kind_is_held_out():
    assert len(HELD_OUT_COLOR_SHAPES) / (len(COLORS) * len(SHAPES)) == pytest.approx(1 / 6)
    assert len(HELD_OUT_TEXTURE_SHAPES) / (len(SAID_TEXTURES) * len(SHAPES)) == pytest.approx(1 / 5)
    assert len(HELD_OUT_COUNT_SHAPES) / (len(COUNTS) * len(SHAPES)) == pytest.approx(1 / 5)
    assert len(HELD_OUT_SHAPE_PAIRS) / 10 == pytest.approx(1 / 5)
    pairs = [p for p in combinations(SHAPES, 2) if frozenset(p) not in HELD_OUT_SHAPE_PAIRS]
    seen_triples = {
        canonical_relation(a, relation, b)
        for pair in pairs
        for a, b in (pair, pair[::-1])
        for relation in RELATIONS
    }
    assert seen_triples >= HELD_OUT_RELATIONS
    assert 0.15 < len(HELD_OUT_RELATIONS) / len(seen_triples) < 0.25
    for subject, axis, other in HELD_OUT_RELATIONS:
        assert (other, axis, subject) not in HELD_OUT_RELATIONS


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_never_sees_what_is_held_out(scenes, split):
    """Checked on the words of captions and on the objects drawn, without `held_out` too."""
    for scene in scenes[split]:
        drawn = [item.object for item in scene.placed]
        assert not held_out(scene.description)
        shapes_drawn = {thing.shape for thing in drawn}
        for thing in drawn:
            assert (thing.color, thing.shape) not in HELD_OUT_COLOR_SHAPES
            assert (thing.texture, thing.shape) not in HELD_OUT_TEXTURE_SHAPES
        for pair in HELD_OUT_SHAPE_PAIRS:
            assert not pair <= shapes_drawn
        words = scene.description.caption.replace("crosses", "cross").split()
        bare = [word.removesuffix("s") if word != "cross" else word for word in words]
        for i, word in enumerate(words):
            if word in COUNTS:
                shape = next(w for w in bare[i:] if w in SHAPES)
                assert (COUNTS.index(word) + 1, shape) not in HELD_OUT_COUNT_SHAPES
            if word in RELATIONS:
                before = next(w for w in bare[i::-1] if w in SHAPES)
                after = next(w for w in bare[i:] if w in SHAPES)
                assert canonical_relation(before, word, after) not in HELD_OUT_RELATIONS


def test_every_test_caption_holds_a_composition_of_its_own_kind_alone(scenes):
    for scene in scenes["test"]:
        kinds = held_out(scene.description)
        assert kinds if scene.category == "complex" else kinds == {scene.category}


def test_training_still_meets_every_word_often(scenes):
    captions = [scene.description.caption.split() for scene in scenes["train"]]
    counts = Counter(word for words in captions for word in set(words))
    assert set(counts) == set(VOCABULARY[3:])
    assert min(counts.values()) > 0.01 * len(captions)
    categories = Counter(scene.category for scene in scenes["train"])
    assert min(categories[category] for category in CATEGORIES) > 0.13 * len(captions)


def test_objects_lie_inside_and_apart_and_as_said(scenes):
    for split in SPLITS:
        for scene in scenes[split]:
            for item in scene.placed:
                assert min(item.x, item.y) >= MARGIN
                assert max(item.x, item.y) + item.size <= IMAGE_SIZE - MARGIN
            for a, b in combinations(scene.placed, 2):
                dx = max(b.x - (a.x + a.size), a.x - (b.x + b.size))
                dy = max(b.y - (a.y + a.size), a.y - (b.y + b.size))
                assert max(dx, dy) >= GAP
            if scene.description.relation is not None:
                a, b = scene.placed[:2]
                beyond = {
                    "left": b.x - (a.x + a.size),
                    "right": a.x - (b.x + b.size),
                    "above": b.y - (a.y + a.size),
                    "below": a.y - (b.y + b.size),
                }
                assert beyond[scene.description.relation] >= GAP


def test_too_many_objects_are_refused():
    with pytest.raises(ValueError, match="9 objects do not fit"):
        place([Object("square", "red", "plain")] * 9, None, Random(0))


def test_pictures_hold_the_background_and_the_colours_of_their_objects():
    example = GeneratedShapes("train", 50, seed=2)[7]
    assert example["image"].shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert example["image"].dtype == np.uint8
    assert (example["image"][0] == BACKGROUND).all()
    colors = {tuple(pixel) for pixel in example["image"].reshape(-1, 3).tolist()}
    assert colors & set(PALETTE.values())


def test_a_seed_and_an_index_decide_an_example():
    source = GeneratedShapes("train", 100, seed=4)
    again = GeneratedShapes("train", 1000, seed=4)
    for i in (0, 57, 99):
        np.testing.assert_array_equal(source[i]["image"], again[i]["image"])
        assert source[i]["caption"] == again[i]["caption"]
    assert source[3]["id"] == "train-4-000003"
    captions = {
        tuple(example["caption"] for example in GeneratedShapes(split, 20, seed))
        for split in SPLITS
        for seed in (4, 5)
    }
    assert len(captions) == 6
    for index in (100, -1):
        with pytest.raises(IndexError, match=r"0\.\.99"):
            source[index]


def test_examples_stay_what_the_committed_weights_were_trained_on():
    digest = hashlib.sha256()
    for example in GeneratedShapes("train", 200, seed=0):
        digest.update(example["caption"].encode())
        digest.update(example["image"].tobytes())
    assert digest.hexdigest()[:16] == "bdffc8bc2ed131ca"


def test_unknown_splits_and_categories_are_refused():
    with pytest.raises(ValueError, match="'dev' is not one of train, validation, test"):
        GeneratedShapes("dev", 1)
    with pytest.raises(ValueError, match="'size' is not one of color, shape"):
        GeneratedShapes("train", 1, category="size")


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_are_of_their_split_distinct_and_as_many_as_there_are(split):
    prompts = random_prompts(split, 60, seed=0)
    assert prompts == random_prompts(split, 60, seed=0) != random_prompts(split, 60, seed=1)
    assert len(set(prompts)) == len(prompts)
    assert list(dict.fromkeys(category for category, _ in prompts)) == list(CATEGORIES)
    for category, prompt in prompts:
        kinds = held_out(parse_caption(prompt))
        if split == "train":
            assert not kinds
        else:
            assert kinds if category == "complex" else kinds == {category}
    few = {"train": {"shape": 45}, "test": {"shape": 40, "texture": 50}}[split]
    assert Counter(c for c, _ in prompts) == {c: few.get(c, 60) for c in CATEGORIES}


def test_the_builder_stores_what_is_drawn(tmp_path, capfd):
    for split, size in (("train", 64), ("validation", 16), ("test", 16)):
        stored = load("tiny", split, tmp_path)
        drawn = GeneratedShapes(split, size)
        assert len(stored) == size
        for i in range(size):
            example, expected = stored[i], drawn[i]
            np.testing.assert_array_equal(example.pop("image"), expected.pop("image"))
            assert example == expected
        with pytest.raises(IndexError):
            stored[size]
    written = capfd.readouterr().err
    assert written.count("building the shapes data set (64 train") == 1
    assert "Traceback" not in written


def test_an_interrupted_build_is_done_again(tmp_path):
    left = tmp_path / "shapes" / "tiny" / "incomplete.ABCDEF_1.0.0"
    left.mkdir(parents=True)
    (left / "shapes-train.array_record-00000-of-00001").write_bytes(b"half")
    assert len(load("tiny", "train", tmp_path)) == 64
    assert not left.exists()


def test_two_processes_build_once(tmp_path):
    code = (
        "import sys; from taca_jax.data.shapes.dataset import load;"
        f"print(load('tiny', 'test', {str(tmp_path)!r})[15]['id'], 'tensorflow' in sys.modules)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert [out for out, _ in results] == ["test-0-000015 False\n"] * 2, results
    assert sum("building the shapes" in err for _, err in results) == 1


def test_damaged_files_say_what_to_remove(tmp_path):
    load("tiny", "train", tmp_path)
    folder = tmp_path / "shapes" / "tiny" / "1.0.0"
    records = next(folder.glob("*train*"))
    whole = records.read_bytes()
    records.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"damaged .*remove {folder} and run again"):
        load("tiny", "train", tmp_path)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=f"damaged .*remove {folder} and run again"):
        load("tiny", "test", tmp_path)
    shutil.rmtree(folder)
    assert len(load("tiny", "train", tmp_path)) == 64


def test_unusable_arguments_of_load_are_users_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'huge' is not one of small, large, tiny"):
        load("huge", "train", tmp_path)
    with pytest.raises(UserError, match="'dev' is not one of train, validation, test"):
        load("tiny", "dev", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot build the shapes data set in"):
        load("tiny", "train", tmp_path / "file")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0 MiB in .* 0 MiB are free; let XDG_CACHE_HOME"):
        load("tiny", "train", tmp_path)
