"""Tars, also damaged ones, as webdataset and img2dataset write them."""

import errno
import io
import os
import re
import tarfile
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from taca_jax.data.config import DataConfig
from taca_jax.data.sources import tars
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.factory import open_source
from taca_jax.data.sources.mixing import MixedSource, parts_of
from taca_jax.data.sources.source import PICTURE_SUFFIXES
from taca_jax.data.sources.stored_scans import scan_once
from taca_jax.data.sources.tars import Broken, Member, expand, walk
from taca_jax.errors import UserError
from tests.data.making import picture_bytes, write_tar

CUT_OFF = "cut off by the end of its tar"


def open_tars(pattern, **changes):
    usual = {"resolution": 16, "max_bad_share": 0.9}
    return open_source(DataConfig(f"webdataset:{pattern}", **(usual | changes)))


def samples(start, count, **further):
    """Files of grey pictures, with the number of each as its shade and in its caption."""
    files = {}
    for i in range(start, start + count):
        files |= {f"{i:05}.png": picture_bytes(i), f"{i:05}.txt": f"number {i}"}
    return files | further


def stored_files():
    return Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npy")


def everything(source):
    """(id, caption, shade of grey) of each example that can be read."""
    found = []
    for i in range(len(source)):
        try:
            example = source[i]
        except BadExampleError:
            continue
        found.append((example["id"], example["caption"], int(example["image"].mean())))
    return found


# Walking


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_where_tarfile_finds_them(tmp_path, format):
    names = ["a.txt", "folder/b.jpg", "long/" * 20 + "n" * 60, "ü.txt"]
    if format != tarfile.USTAR_FORMAT:
        names.append("x" * 300)
    path = write_tar(tmp_path / "a.tar", {n: b"." * (700 * i) for i, n in enumerate(names)}, format)
    with tarfile.open(path) as tar:
        expected = [Member(info.name, info.offset_data, info.size) for info in tar]
    assert [*walk(path)] == expected
    assert [member.name for member in expected] == names


def test_behind_a_broken_header_the_next_files_are_found(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.txt": bytes([i]) * 3000 for i in range(5)})
    content = bytearray(path.read_bytes())
    whole = [*walk(path)]
    start = whole[2].offset - 512
    content[start + 5 : start + 90] = b"\xff" * 85
    path.write_bytes(content)
    assert [*walk(path)] == [*whole[:2], Broken(f"byte {start}", "broken tar header"), *whole[3:]]
    path.write_bytes(content[: whole[4].offset + 2999])
    assert [*walk(path)][-1] == Broken("4.txt", "cut off by the end of its tar")
    assert len([*walk(path)]) == 5
    path.write_bytes(b"this is no tar at all" * 1000)
    assert [*walk(path)] == [Broken("byte 0", "broken tar header")]
    path.write_bytes(b"")
    assert [*walk(path)] == []


@pytest.mark.parametrize("size", ["-5120", "1.5", "12x", "", "9" * 5000])
def test_a_size_that_is_none_is_a_broken_file(tmp_path, size):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in "abc":
            info = tarfile.TarInfo(name)
            info.size = 700
            info.pax_headers = {"size": size} if name == "b" else {}
            tar.addfile(info, io.BytesIO(b"." * 700))
    first, broken, last = islice(walk(path), 4)
    assert broken == Broken("b", "its size is no number of bytes")
    assert (first.name, last.name, last.size) == ("a", "c", 700)


def set_size(path, number, size, kind=tarfile.REGTYPE):
    """Writes a size in binary and a type into the header of a member, and the checksum anew."""
    content = bytearray(path.read_bytes())
    start = [*walk(path)][number].offset - 512
    content[start + 124 : start + 136] = size.to_bytes(12, "big", signed=True)
    content[start + 156 : start + 157] = kind
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Z"])
def test_a_size_below_zero_does_not_go_back(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", dict.fromkeys("abc", "." * 700))
    set_size(path, 1, -1024, kind)
    found = [*islice(walk(path), 10)]
    assert found[1] == Broken("b", "its size is no number of bytes")
    assert [member.name for member in (found[0], found[2])] == ["a", "c"]


def test_what_could_not_be_read_for_a_moment_is_read_again(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", samples(0, 3))
    write_tar(tmp_path / "b.tar", samples(3, 2))
    read, opened, refused = os.pread, tarfile.TarInfo.fromtarfile, (tmp_path / "b.tar").stat()

    def refuse(handle, size=0, offset=0):
        if os.path.samestat(os.fstat(handle), refused):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(handle, size, offset)

    def refuse_header(tar):
        refuse(tar.fileobj.fileno())
        return opened(tar)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarInfo, "fromtarfile", refuse_header)
        assert len(open_tars(f"{tmp_path}/*.tar")) == 3
    source = open_tars(f"{tmp_path}/*.tar")
    assert len(source) == 5
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", refuse)
        assert (source.sizes()[3:] == 0).all()
    assert (source.sizes() > 0).all()
    assert len([*stored_files()]) == 3  # of both tars, and the sizes


def test_a_sparse_file_is_left_out_and_a_damaged_one_reported(tmp_path):
    path = tmp_path / "a.tar"
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    for content, expected in ((b"0\n".ljust(700, b"\0"), ["a", "c"]), (b"." * 700, ["a", 0, "c"])):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in "abc":
                info = tarfile.TarInfo(name)
                info.size = 700
                info.pax_headers = sparse if name == "b" else {}
                tar.addfile(info, io.BytesIO(content))
        found = [member.name if isinstance(member, Member) else 0 for member in walk(path)]
        assert found == expected


def test_newer_versions_of_tarfile_give_the_same_report(tmp_path, monkeypatch):
    """They raise an error for a size below 0 (Python issue 130577)."""
    path = write_tar(tmp_path / "a.tar", dict.fromkeys("abc", "." * 700))
    set_size(path, 1, -1024)
    expected = [*walk(path)]
    block = tarfile.TarInfo._block

    def checked(self, count):
        if count < 0:
            raise tarfile.InvalidHeaderError("invalid offset")
        return block(self, count)

    monkeypatch.setattr(tarfile.TarInfo, "_block", checked)
    assert [*walk(path)] == expected


@pytest.mark.parametrize("left", [1024, 1000, 512, 1])
def test_a_tar_that_ends_between_two_members_is_cut_off(tmp_path, left):
    """In the header of a long name, or behind it."""
    path = write_tar(tmp_path / "a.tar", {"a": "x" * 600, "n" * 200: "y"}, tarfile.GNU_FORMAT)
    first, _ = walk(path)
    path.write_bytes(path.read_bytes()[: 512 + 1024 + left])
    assert [*walk(path)] == [first, Broken(f"byte {1536 + (left > 512) * 512}", CUT_OFF)]


def test_zeros_that_are_cut_off_are_no_damage(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a": "x"})
    path.write_bytes(path.read_bytes()[: 1024 + 700])
    assert [*walk(path)] == [Member("a", 512, 1)]


def test_two_tars_in_one_file(tmp_path):
    first, second = (write_tar(tmp_path / f"{n}.tar", {f"{n}.txt": n * 600}) for n in "ab")
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert [member.name for member in walk(both)] == ["a.txt", "b.txt"]


def test_patterns(tmp_path, monkeypatch):
    for name in ("x-008.tar", "x-009.tar", "x-010.tar", "y.tar"):
        (tmp_path / name).touch()
    names = lambda pattern: [path.name for path in expand(f"{tmp_path}/{pattern}")]  # noqa: E731
    assert names("x-{008..010}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar"]
    assert names("{y,x-009}.tar") == ["y.tar", "x-009.tar"]
    assert names("{x,x}-0{08..09}.tar") == 2 * ["x-008.tar", "x-009.tar"]
    assert names("*.tar") == ["x-008.tar", "x-009.tar", "x-010.tar", "y.tar"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [path.name for path in expand("~/y.tar")] == ["y.tar"]
    with pytest.raises(UserError, match=r"names 4 files, of which 1 are not there \(such as .*011"):
        names("x-{008..011}.tar")
    with pytest.raises(UserError, match="matches no file"):
        names("z*.tar")


# Samples


def test_samples_of_several_tars_by_index(tmp_path):
    write_tar(tmp_path / "00.tar", samples(0, 3))
    write_tar(tmp_path / "01.tar", {})
    write_tar(tmp_path / "02.tar", samples(3, 2))
    source = open_tars(f"{tmp_path}/{{00..02}}.tar")
    assert len(source) == 5
    shards = ["00.tar"] * 3 + ["02.tar"] * 2
    expected = [(f"{tar}/{i:05}", f"number {i}", i) for i, tar in enumerate(shards)]
    assert everything(source) == expected
    assert source.bad.count == 0
    read = {}

    def worker(i):
        read[i] = source[i]["caption"]

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == {i: f"number {i}" for i in range(5)}


def test_captions_in_json_several_and_none(tmp_path, caplog):
    files = {
        "a/x.y.jpg": b"not a sample's picture: its suffix is y.jpg",
        "a/1.JPG": picture_bytes(1, format="JPEG"),
        "a/1.json": {"caption": ["one", " ", "first"], "url": "http://x"},
        "2.webp": picture_bytes(2, format="WEBP", lossless=True),
        "2.json": {"text": " two "},
        "2.txt": "the .txt goes first",
        "3.png": picture_bytes(3),
        "4.png": picture_bytes(4),
        "4.json": {"url": "no caption"},
        "5.png": picture_bytes(5),
        "5.json": b"\xff{",
        "6.txt": "no picture",
        "._1.jpg": b"left by a system",
        "7.png": picture_bytes(7),
        "7.txt": b"\xff\xfe",
    }
    source = open_tars(write_tar(tmp_path / "t.tar", files))
    assert everything(source) == [
        ("t.tar/a/1", ("one", "first"), 1),
        ("t.tar/2", "the .txt goes first", 2),
    ]
    assert (source.bad.count, source.bad.total) == (4, 6)
    messages = "\n".join(record.message for record in caplog.records)
    for said in (
        "skipped 1: without a caption (in a .txt or .json of its name): t.tar/3",
        "t.tar/4: its .json has no caption",
        "t.tar/5: its .json is not UTF-8 JSON",
        "t.tar/7: its .txt is not UTF-8",
    ):
        assert said in messages
    assert source.bad.summary() == (
        "skipped 4 of 6 pictures: 1 without a caption (in a .txt or .json of its name); 1 its "
        ".json has no caption; 1 its .json is not UTF-8 JSON; 1 its .txt is not UTF-8"
    )


def test_a_torn_tar_gives_what_is_whole(tmp_path, caplog):
    path = write_tar(tmp_path / "t.tar", samples(0, 6))
    content = bytearray(path.read_bytes())
    members = [*walk(path)]
    start = members[4].offset - 512  # the third picture's
    content[start : start + 100] = b"\xff" * 100
    path.write_bytes(content[: members[-1].offset + 3])
    source = open_tars(path)
    assert [number for _, _, number in everything(source)] == [0, 1, 3, 4]
    assert source.bad.count == 3  # the third picture, the last caption, and the one without it
    messages = "\n".join(record.message for record in caplog.records)
    assert f"broken tar header: t.tar/byte {start}" in messages
    assert "cut off by the end of its tar: t.tar/00005.txt" in messages


def test_where_files_are_is_found_once_and_again_when_a_tar_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "t.tar", samples(0, 2))
    expected = everything(open_tars(path))
    walked = []
    monkeypatch.setattr(
        "taca_jax.data.sources.webdataset.walk",
        lambda path: (walked.append(path), tars.walk(path))[1],
    )
    assert everything(open_tars(path)) == expected
    assert walked == []
    write_tar(path, samples(0, 3))
    assert len(open_tars(path)) == 3
    assert walked == [path]


def test_a_tar_is_indexed_again_when_other_suffixes_count(tmp_path, monkeypatch):
    files = samples(0, 1, **{"00001.jfif": picture_bytes(1, format="JPEG"), "00001.txt": "new"})
    path = write_tar(tmp_path / "t.tar", files)
    assert len(open_tars(path)) == 1
    module = "taca_jax.data.sources.webdataset"
    monkeypatch.setattr(f"{module}.PICTURE_SUFFIXES", (*PICTURE_SUFFIXES, ".jfif"))
    assert [caption for _, caption, _ in everything(open_tars(path))] == ["number 0", "new"]


@pytest.mark.parametrize("version", ["webdataset._INDEX_VERSION", "source._SIZES_VERSION"])
def test_a_newer_scan_does_not_take_what_an_older_one_found(tmp_path, monkeypatch, version):
    path = write_tar(tmp_path / "t.tar", samples(0, 2))
    open_tars(path).sizes()
    stored = {*stored_files()}
    open_tars(path).sizes()
    assert {*stored_files()} == stored
    monkeypatch.setattr(f"taca_jax.data.sources.{version}", 99)
    open_tars(path).sizes()
    assert len(stored) == 2
    assert len({*stored_files()}) == 3


def test_a_scan_is_stored_by_its_name_its_rules_and_its_files(tmp_path):
    calls = [("a", 1, b"x"), ("b", 1, b"x"), ("a", 2, b"x"), ("a", 1, b"y")]
    for number, call in enumerate(calls):
        scan_once(*call, lambda number=number: (np.array([number]), True))
    for number, call in enumerate(calls):
        assert scan_once(*call, lambda: pytest.fail("it is stored")) == [number]


def test_tars_that_cannot_be_used(tmp_path):
    write_tar(tmp_path / "empty.tar", {"a.txt": "x"})
    (tmp_path / "no.tar").write_bytes(b"<html>404" * 100)
    with pytest.raises(UserError, match=r"1 tars in .* hold no pictures \(.png, .jpg"):
        open_tars(tmp_path / "empty.tar")
    with pytest.raises(UserError, match=r"1 of 1 pictures cannot be used.*broken tar header"):
        open_tars(tmp_path / "no.tar")


# img2dataset


def img2dataset(root, layout, keys, captions=True):
    """Two shards, of which the second lacks .txt files and a picture that was not downloaded."""
    for shard in range(2):
        files, rows = {}, []
        for i in keys[shard]:
            key = f"{shard:05}{i:04}"
            row = {"key": key, "caption": f"number {i}", "status": "success", "url": "http://x"}
            if i % 4 == 3:
                row |= {"status": "failed_to_download"}
            else:
                files[f"{key}.jpg"] = picture_bytes(i, format="JPEG")
                files[f"{key}.json"] = row
                if shard == 0:
                    files[f"{key}.txt"] = row["caption"]
            rows.append(row)
        if shard == 1:  # written without metadata
            files = {name: content for name, content in files.items() if name.endswith(".jpg")}
        if layout == "webdataset":
            write_tar(root / f"{shard:05}.tar", files)
        else:
            (root / f"{shard:05}").mkdir()
            for name, content in files.items():
                if not isinstance(content, bytes):
                    content = str(content).encode()
                (root / f"{shard:05}" / name).write_bytes(content)
        if captions:
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, root / f"{shard:05}.parquet")
        (root / f"{shard:05}_stats.json").write_text("{}")


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_what_img2dataset_writes(tmp_path, layout):
    keys = [range(4), range(4, 8)]
    img2dataset(tmp_path, layout, keys)
    source = open_source(DataConfig(f"img2dataset:{tmp_path}", resolution=16))
    found = everything(source)
    assert [caption for _, caption, _ in found] == [f"number {i}" for i in (0, 1, 2, 4, 5, 6)]
    assert np.abs(np.subtract([grey for *_, grey in found], [0, 1, 2, 4, 5, 6])).max() <= 1
    assert source.bad.count == 0


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_without_its_parquet_captions_are_missed(tmp_path, layout):
    img2dataset(tmp_path, layout, [range(4), range(4, 8)], captions=False)
    source = open_source(DataConfig(f"img2dataset:{tmp_path}", resolution=16, max_bad_share=0.5))
    assert len(source) == 3
    assert source.bad.count == 3
    (tmp_path / "00001.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match=re.escape("00001.parquet cannot be read (")):
        open_source(DataConfig(f"img2dataset:{tmp_path}", resolution=16))


def test_an_output_folder_that_is_not_there(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere is not there; data\.source=img2dataset:PATH takes"
    ):
        open_source(DataConfig(f"img2dataset:{tmp_path}/nowhere"))


# Several


def test_several_sources_are_one_after_the_other(tmp_path):
    write_tar(tmp_path / "a.tar", samples(0, 3))
    write_tar(tmp_path / "b.tar", samples(3, 2))
    names = (f"webdataset:{tmp_path}/a.tar", f"webdataset:{tmp_path}/b.tar")
    source = open_source(DataConfig(names, resolution=16))
    assert isinstance(source, MixedSource)
    assert [source[i]["caption"] for i in range(5)] == [f"number {i}" for i in range(5)]
    assert [len(part) for part in parts_of(source)] == [3, 2]
    with pytest.raises(IndexError):
        source[5]
