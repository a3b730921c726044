"""Pictures and captions in a bucket: tars, folders, img2dataset's and TFDS's, as on a disk."""

import io
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from taca_jax.data.config import DataConfig
from taca_jax.data.sources.factory import open_source
from taca_jax.data.sources.source import PictureSource
from taca_jax.errors import UserError

COUNT = 6


def png(i):
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same pictures in a folder and in two tars."""
    root = tmp_path_factory.mktemp("local")
    for name in ("folder/sub", "tars"):
        (root / name).mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / f"tars/{shard:05}.tar", "w") as tar:
            for i in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                for name, content in ((f"{i}.png", png(i)), (f"{i}.txt", f"picture {i}".encode())):
                    (root / "folder/sub" / name).write_bytes(content)
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


def opened(source):
    found = open_source(DataConfig(source, 2, 16))
    assert isinstance(found, PictureSource)
    return found


def contents(source):
    found = opened(source)
    assert len(found) == COUNT
    sizes = found.sizes()
    return [
        (e["caption"], e["image"].tobytes(), e["id"]) for e in map(found.__getitem__, range(6))
    ] + [tuple(size) for size in sizes.tolist()]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("folder", "folder"),
        ("webdataset", "tars/{00000..00001}.tar"),
        ("webdataset", "tars/*.tar"),
        ("img2dataset", "tars"),
    ],
)
def test_a_bucket_gives_what_a_disk_gives(bucket, local, kind, place):
    bucket.add_folder(local, "data")
    there = contents(f"{kind}:gs://bucket/data/{place}")
    assert there == contents(f"{kind}:{local}/{place}")


def test_tars_are_read_through_once(bucket, local):
    bucket.add_folder(local, "data")
    opened("webdataset:gs://bucket/data/tars/*.tar")
    bucket.asked.clear()
    again = opened("webdataset:gs://bucket/data/tars/*.tar")
    assert not [name for _, name in bucket.asked if name.endswith(".tar")]
    again[0]
    assert {name for _, name in bucket.asked if name} == {"data/tars/00000.tar"}


def test_a_changed_tar_is_read_again(bucket, local):
    bucket.add_folder(local, "data")
    assert len(opened("webdataset:gs://bucket/data/tars/*.tar")) == COUNT
    bucket.write("data/tars/00001.tar", (local / "tars/00000.tar").read_bytes())
    bucket.write("data/tars/00000.tar", b"")
    assert len(opened("webdataset:gs://bucket/data/tars/00001.tar")) == COUNT // 2


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Pictures with captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(COUNT):
            yield i, {"image": io.BytesIO(png(i)), "caption": f"picture {i}"}


def test_tfds_is_read_in_place(bucket, tmp_path):
    builder = Pictures(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    bucket.add_folder(tmp_path / "tfds", "tfds")
    where = str(builder.data_path).removeprefix(f"{tmp_path}/")
    there = contents(f"tfds:gs://bucket/{where}")
    assert sorted(each[0] for each in there[:COUNT]) == [f"picture {i}" for i in range(COUNT)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("folder:gs://bucket/none", "gs://bucket/none holds no pictures"),
        ("webdataset:gs://bucket/none/{0..2}.tar", "names 3 files, of which 3 are not there"),
        ("webdataset:gs://bucket/none/*.tar", "matches no file"),
        ("webdataset:gs://none/*.tar", "gs://none cannot be used: there is no such bucket"),
        ("img2dataset:gs://bucket/none", "gs://bucket/none is not there"),
        ("tfds:gs://none/x", "gs://none cannot be used"),
    ],
)
def test_what_is_not_there_is_said(bucket, source, message):
    with pytest.raises(UserError, match=message):
        opened(source)
