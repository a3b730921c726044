"""Lists, names and result files."""

import json

import pytest

from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.folders import (
    categories_in,
    picture_name,
    pictures_in,
    prompts_of,
    prompts_text,
    read_result,
    write_result,
)
from taca_jax.evaluation.compbench.prompts import read_prompts
from tests.evaluation.compbench.runs import PROMPTS, write_lists
from tests.shared import shared_path


def test_lists_are_read_whatever_their_line_ends(tmp_path):
    write_lists(tmp_path)
    for category, prompts in PROMPTS.items():
        assert read_prompts(tmp_path, category) == list(prompts)
    (tmp_path / "shape_val.txt").write_bytes(b"\xef\xbb\xbfa big dog\n")  # a byte order mark
    assert read_prompts(tmp_path, "shape") == ["a big dog"]


def test_lists_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red car\n\na blue car\n")
    (tmp_path / "shape_val.txt").write_bytes(b"a caf\xe9")
    (tmp_path / "texture_val.txt").write_text("")
    for category, message in {
        "color": "color_val.txt: line 2 is empty",
        "shape": "shape_val.txt is no UTF-8 text",
        "texture": "texture_val.txt: all of it is empty",
        "complex": "complex_val.txt is not there; fetch examples/dataset of github.com/Karine-Hu",
    }.items():
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path, category)


def test_the_published_lists_have_300_prompts_each():
    lists = shared_path("assets/prompts/t2i_compbench")
    for category in ("color", "shape", "texture", "spatial", "non_spatial", "complex"):
        prompts = read_prompts(lists, category)
        assert len(prompts) == 300
        assert all(picture_name(p, 7) == f"{p}_000007.png" for p in prompts)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a green bench and a blue bowl", "a green bench and a blue bowl_000012.png"),
        ('a "red" car\'s door', 'a "red" car\'s door_000012.png'),
        ("a red/blue car", "a red blue car_000012.png"),
        ("x" * 400, "x" * 244 + "_000012.png"),
        ("é" * 200, "é" * 122 + "_000012.png"),
        ("x" + "é" * 200, "x" + "é" * 121 + "_000012.png"),  # 255 bytes would cut one in half
    ],
)
def test_any_prompt_names_a_file(tmp_path, prompt, name):
    assert picture_name(prompt, 12) == name
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / name).touch()
    assert list(pictures_in(tmp_path)) == [12]


def test_prompts_come_from_the_record_or_from_upstreams_names(tmp_path):
    (tmp_path / "samples").mkdir()
    for number, prompt in enumerate(["a/b", "a/b", "c_d"]):
        (tmp_path / "samples" / picture_name(prompt, number)).touch()
    assert prompts_of(tmp_path, [1, 2]) == {1: "a b", 2: "c_d"}
    with pytest.raises(UserError, match="has no picture 3, which is scored"):
        prompts_of(tmp_path, [2, 3])
    (tmp_path / "prompts.json").write_text(prompts_text(["a/b", "c_d"], 2))
    assert prompts_of(tmp_path, [0, 1, 2]) == {0: "a/b", 1: "a/b", 2: "c_d"}
    for damaged in ("{", "[]", '{"prompts": []}', '{"prompts": ["a"], "num_images": 0}'):
        (tmp_path / "prompts.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged or not of these pictures"):
            prompts_of(tmp_path, [0])


def test_pictures_without_a_number_or_with_the_same_are_refused(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a_000001.png").touch()
    (tmp_path / "samples" / "b_000001.png").touch()
    with pytest.raises(UserError, match="have the same number"):
        pictures_in(tmp_path)
    (tmp_path / "samples" / "a_000001.png").rename(tmp_path / "samples" / "a.png")
    with pytest.raises(UserError, match="has no number"):
        pictures_in(tmp_path)
    with pytest.raises(UserError, match="has no folder of a category"):
        categories_in(tmp_path)


def test_results_are_as_upstream_has_them(tmp_path):
    file = tmp_path / "annotation_blip" / "vqa_result.json"
    write_result(file, {0: "0.6900", 1: "0.7110"})
    assert json.loads(file.read_text()) == [
        {"question_id": 0, "answer": "0.6900"},
        {"question_id": 1, "answer": "0.7110"},
    ]
    assert read_result(file) == {0: 0.69, 1: 0.711}
    for damaged in ("", "[]", '[{"question_id": 0}]', '[{"question_id": 0, "answer": "NaN"}]'):
        file.write_text(damaged)
        with pytest.raises(UserError, match="is not as upstream writes it"):
            read_result(file)
