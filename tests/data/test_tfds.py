"""Data sets that TFDS has prepared: what of them is read, and what is refused."""

import json
import logging
from functools import partial

import numpy as np
import pytest
import tensorflow_datasets as tfds

from taca_jax.data.buckets import make_buckets
from taca_jax.data.config import DataConfig
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.factory import open_source
from taca_jax.errors import UserError
from taca_jax.loggers import silenced
from tests.data.making import picture_bytes

SIZES = [(24, 20), (20, 24), (40, 20), (24, 20), (24, 20)]


class Captioned(tfds.core.GeneratorBasedBuilder):
    """Captions as in COCO, of which example 0 has none; the picture of example 3 is not one."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        texts = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
        features = {"image": tfds.features.Image(), "captions": texts}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            picture = b"no picture" if i == 3 else picture_bytes(i, SIZES[i])
            captions = [{"id": j, "text": f"{i} {j} é"} for j in range(i)]
            yield i, {"image": picture, "captions": captions}


class Labelled(Captioned):
    """Pictures with one text, under a name that captions do not have."""

    NAME = "label"

    def _info(self):
        features = {"image": tfds.features.Image(), self.NAME: tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": picture_bytes(i), self.NAME: f" a grey {i} "}


class Texts(Labelled):
    NAME = "text"


class Records(Labelled):
    """Pictures with one record, in which the text is."""

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "caption": {"text": tfds.features.Text()},
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": picture_bytes(i), "caption": {"text": f"record {i}"}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folders of the prepared data sets by name; tests must not change them."""
    root = tmp_path_factory.mktemp("tfds")
    folders = {}
    tfds.disable_progress_bar()
    for kind in (Captioned, Labelled, Texts, Records):
        with silenced("absl", below=logging.ERROR):
            builder = kind(data_dir=str(root), file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
        folders[kind.__name__] = root / builder.name / "1.0.0"
    return folders


def opened(folder, split="", **changes):
    changes = {"resolution": 16, "max_bad_share": 0.5, **changes}
    return open_source(DataConfig(f"tfds:{folder}{split}", **changes))


def test_pictures_and_captions(prepared):
    source = opened(prepared["Captioned"])
    assert len(source) == 5
    assert source[1]["caption"] == "1 0 é"
    assert source[2]["caption"] == ("2 0 é", "2 1 é")
    assert source[2]["id"] == f"{prepared['Captioned']}#train/2"
    np.testing.assert_array_equal(source[4]["image"], np.full((16, 16, 3), 4, np.uint8))
    assert opened(prepared["Texts"])[4]["caption"] == "a grey 4"
    assert opened(prepared["Records"])[4]["caption"] == "record 4"


def test_a_caption_that_is_given(prepared):
    """Also of a data set that has none at all."""
    assert opened(prepared["Captioned"], caption="a picture")[0]["caption"] == "a picture"
    assert opened(prepared["Captioned"], caption="this: {}")[1]["caption"] == "this: 1 0 é"
    assert opened(prepared["Labelled"], caption="a picture")[2]["caption"] == "a picture"
    with pytest.raises(UserError, match="lacks a caption"):
        opened(prepared["Labelled"], caption="this: {}")


def test_splits_and_parts_of_them(prepared):
    assert len(opened(prepared["Captioned"], "#test")) == 2
    part = opened(prepared["Captioned"], "#train[40%:]")
    assert len(part) == 3
    assert part[0]["caption"] == ("2 0 é", "2 1 é")


def test_bad_examples_are_counted_and_named(prepared, caplog):
    source = opened(prepared["Captioned"])
    for index, reason in ((0, "its captions is empty"), (3, "not a PNG, JPEG or WebP picture")):
        with pytest.raises(BadExampleError, match=reason):
            source[index]
        assert f"{prepared['Captioned']}#train, example {index}" in caplog.text


def test_buckets(prepared):
    source = opened(prepared["Captioned"])
    data = DataConfig(
        f"tfds:{prepared['Captioned']}",
        batch_size=1,
        resolution=24,
        aspect="buckets",
        max_bad_share=0.5,
    )
    buckets = make_buckets(source, data, multiple=8, least=1)
    members = {bucket.size: bucket.parts[0].tolist() for bucket in buckets}
    height, width = next(size for size, found in members.items() if 2 in found)
    assert width > height
    assert source.read(2, (height, width))["image"].shape == (height, width, 3)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("Captioned", "#dev", r"#dev; its splits are train, test"),
        ("Captioned", "#train[1:x]", "cannot be read: "),
        ("Captioned", "#train[:0]", "cannot be read: "),
        ("Labelled", "", r"lacks a caption \(.*text.*\); its features are image, label"),
    ],
)
def test_data_sets_that_cannot_be_used(prepared, name, split, message):
    with pytest.raises(UserError, match=message):
        opened(prepared[name], split)


def test_a_data_set_that_is_stored_in_another_way(prepared, tmp_path):
    info = json.loads((prepared["Texts"] / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    folder = tmp_path / "texts" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text((prepared["Texts"] / "features.json").read_text())
    with pytest.raises(UserError, match="stored as tfrecord, which cannot be shuffled; prepare it"):
        opened(folder)


def test_data_sets_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "builder", partial(tfds.builder, data_dir=str(tmp_path)))
    with pytest.raises(UserError, match="nowhere: Dataset nowhere not found; give TFDS's name"):
        open_source(DataConfig("tfds:nowhere"))
    with pytest.raises(UserError, match=r"tfds:mnist is not in .*; prepare it with `tfds build"):
        open_source(DataConfig("tfds:mnist"))
