"""`data.caption`: a caption for pictures that have none, or what is made of each."""

import json

import pytest
from PIL import Image

from taca_jax.data.cache.manifest import differences, picture_fields
from taca_jax.data.config import DataConfig
from taca_jax.data.sources.factory import open_source
from taca_jax.errors import UserError
from tests.data.making import picture_bytes, write_tar

TEMPLATE, DEFAULT = "a photo of {}, {} again", "a picture"


@pytest.fixture
def folder(tmp_path):
    """Pictures with one caption, several, an empty one, one in a table, and none."""
    for name in ("empty", "none", "one", "several", "table", "table_empty"):
        Image.new("RGB", (24, 20)).save(tmp_path / f"{name}.png")
    (tmp_path / "one.txt").write_text("a cat")
    (tmp_path / "several.json").write_text(json.dumps({"captions": ["a dog", "a hound"]}))
    (tmp_path / "empty.txt").write_text(" ")
    lines = [{"file": "table.png", "caption": "a cow"}, {"file": "table_empty.png", "caption": ""}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"folder:{tmp_path}"


@pytest.fixture
def tar(tmp_path):
    picture = picture_bytes()
    files = {"1.png": picture, "1.txt": "a cat", "2.png": picture, "2.json": {"caption": ""}}
    return f"webdataset:{write_tar(tmp_path / 't.tar', files | {'3.png': picture})}"


def captions(source, **changes):
    """By the names of the examples that can be read."""
    opened = open_source(DataConfig(source, resolution=16, max_bad_share=0.9, **changes))
    found = {}
    for i in range(len(opened)):
        try:
            example = opened[i]
        except Exception as error:
            assert type(error).__name__ == "NoCaptionError"  # noqa: PT017
            continue
        found[example["id"].split(".png")[0]] = example["caption"]
    return found


OWN = {"one": "a cat", "several": ("a dog", "a hound"), "table": "a cow"}


def test_a_default_is_for_pictures_without_a_caption(folder, tar):
    none = dict.fromkeys(("empty", "none", "table_empty"), DEFAULT)
    assert captions(folder) == OWN
    assert captions(folder, caption=DEFAULT) == OWN | none
    assert captions(tar, caption=DEFAULT) == {
        "t.tar/1": "a cat",
        "t.tar/2": DEFAULT,
        "t.tar/3": DEFAULT,
    }


def test_a_template_is_for_pictures_with_a_caption(folder, tar):
    assert captions(folder, caption=TEMPLATE) == {
        "one": "a photo of a cat, a cat again",
        "several": ("a photo of a dog, a dog again", "a photo of a hound, a hound again"),
        "table": "a photo of a cow, a cow again",
    }
    assert captions(tar, caption=TEMPLATE) == {"t.tar/1": "a photo of a cat, a cat again"}


@pytest.mark.parametrize("layout", ["tars", "folders"])
def test_captions_of_img2dataset(tmp_path, layout):
    if layout == "tars":
        write_tar(tmp_path / "00000.tar", {"1.png": picture_bytes()})
    else:
        (tmp_path / "00000").mkdir()
        (tmp_path / "00000" / "1.png").write_bytes(picture_bytes())
    assert [*captions(f"img2dataset:{tmp_path}", caption=DEFAULT).values()] == [DEFAULT]


def test_a_cache_is_of_its_captions():
    """One that was made before there were such captions serves a run without."""
    plain, given = (
        picture_fields(DataConfig("folder:x", caption=caption)) for caption in (None, DEFAULT)
    )
    assert differences(plain, given) == ["caption"]
    del plain["caption"]
    assert differences(plain, picture_fields(DataConfig("folder:x"))) == []


@pytest.mark.parametrize(
    ("source", "caption", "message"),
    [
        ("folder:x", "  ", "give a text, a template with {}, or none"),
        ("generated:shapes#color", DEFAULT, "shapes#color has captions of its own words"),
        ("tfds:shapes/small", TEMPLATE, "has captions of its own words for all its pictures; set"),
    ],
)
def test_captions_that_are_refused(source, caption, message):
    with pytest.raises(UserError, match=message):
        DataConfig(source, caption=caption)
