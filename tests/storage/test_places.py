"""Places in buckets: reading, writing whole, what a bucket refuses, and what is copied from it."""

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest

from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file, whole_folder
from taca_jax.storage import fetching, places
from taca_jax.storage.places import files_in, in_bucket, place, reach, stats
from taca_jax.storage.writing import Mirror, move, remove
from tests.processes import ended, run_python, start_python


def test_local_places_stay_paths(tmp_path):
    assert place(str(tmp_path)) == tmp_path
    assert not in_bucket(place(tmp_path))
    reach(tmp_path / "not there")


def test_a_file_is_written_and_read(bucket):
    file = place("gs://bucket/a/b.txt")
    with whole_file(file) as made:
        made.write_text("x")
        assert bucket.names() == []
    assert in_bucket(file)
    assert file.read_text() == "x"
    assert str(file) == "gs://bucket/a/b.txt"
    assert [each.name for each in file.parent.iterdir()] == ["b.txt"]


def test_a_file_that_fails_leaves_the_old_one(bucket):
    bucket.write("a.txt", b"old")

    def fail():
        with whole_file(place("gs://bucket/a.txt")) as made:
            made.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert bucket.read("a.txt") == b"old"


def test_a_folder_replaces_the_one_before_and_its_marker_comes_last(bucket):
    for name in ("m/config.json", "m/old.bin"):
        bucket.write(name, b"old")
    seen = []
    bucket.seen = lambda method, _, name: seen.append((method, name))
    with whole_folder(place("gs://bucket/m"), "config.json") as made:
        (made / "config.json").write_text("new")
        (made / "sub").mkdir()
        (made / "sub/x.bin").write_bytes(b"x")
    changes = [(m, n) for m, n in seen if m in ("DELETE", "PUT", "POST") and n.startswith("m")]
    assert changes[-1] == ("POST", "m/config.json")
    assert bucket.names() == ["m/config.json", "m/sub/x.bin"]


WRITER = """
import sys
from taca_jax.formats.atomic import whole_folder
from taca_jax.storage.places import place
with whole_folder(place("gs://bucket/m"), "config.json") as made:
    for name in ("config.json", "a.bin", "b.bin", "c.bin"):
        (made / name).write_bytes(b"new")
"""


def test_a_writer_that_is_killed_leaves_no_folder_to_readers(bucket):
    for name in ("config.json", "a.bin"):
        bucket.write(f"m/{name}", b"old")
    process = start_python("-c", WRITER, environment=bucket.environment)

    def kill(method, _, name):
        if method == "POST" and name == "m/b.bin":
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.1)

    bucket.seen = kill
    assert ended(process).returncode == -signal.SIGKILL
    assert "m/config.json" not in bucket.names()
    bucket.seen = None
    assert run_python("-c", WRITER, environment=bucket.environment).returncode == 0
    assert bucket.names() == ["m/a.bin", "m/b.bin", "m/c.bin", "m/config.json"]


def test_folders_are_moved_and_removed(bucket):
    bucket.write("a/1/x", b"x")
    move(place("gs://bucket/a/1"), place("gs://bucket/damaged/1"))
    assert bucket.names() == ["damaged/1/x"]
    remove(place("gs://bucket/damaged"))
    remove(place("gs://bucket/damaged"))
    assert bucket.names() == []


def test_files_that_grow_are_copied_when_they_have_changed(bucket):
    bucket.write("run/log", b"1\n")
    mirror = Mirror(place("gs://bucket/run"))
    mirror.fetch("log")
    assert (mirror.folder / "log").read_text() == "1\n"
    (mirror.folder / "log").write_text("1\n2\n")
    mirror.upload()
    asked = len(bucket.asked)
    mirror.upload()
    assert len(bucket.asked) == asked
    mirror.close()
    assert bucket.read("run/log") == b"1\n2\n"
    assert not mirror.folder.exists()


def test_a_folder_is_asked_once_for_all_of_its_files(bucket):
    for name in ("d/a", "d/b", "d/sub/c", "e"):
        bucket.write(name, b"12")
    bucket.asked.clear()
    found = stats([place(f"gs://bucket/d/{name}") for name in ("a", "b", "none")])
    assert [None if each is None else each.size for each in found] == [2, 2, None]
    assert len(bucket.asked) <= 3
    assert [*files_in(place("gs://bucket/d"))] == ["a", "b", "sub/c"]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "no credentials: run `gcloud auth application-default login`"),
        (403, "the account may not"),
        (404, "there is no such bucket"),
    ],
)
def test_a_bucket_that_refuses_is_one_line(bucket, status, message):
    bucket.refused = status
    with pytest.raises(UserError, match=message):
        reach(place("gs://bucket/x"))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    places.filesystem.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'taca-jax\[gcs\]'"):
        place("gs://bucket/x")
    places.filesystem.cache_clear()


def test_what_is_fetched_stays_until_it_changes(bucket, tmp_path):
    bucket.write("w/a.bin", bytes(range(200)))
    bucket.write("w/b.bin", b"")
    folder = place("gs://bucket/w")
    assert in_bucket(folder)
    copy = fetching.fetch(folder, files_in(folder))
    assert copy == tmp_path / "copies/taca_jax/buckets/bucket/w"
    assert (copy / "a.bin").read_bytes() == bytes(range(200))
    assert (copy / "b.bin").read_bytes() == b""
    bucket.asked.clear()
    fetching.fetch(folder, files_in(folder))
    assert ("GET", "w/a.bin") not in bucket.asked
    time.sleep(1.1)  # times are compared in seconds
    bucket.write("w/a.bin", bytes(200))
    fetching.fetch(folder, files_in(folder))
    assert (copy / "a.bin").read_bytes() == bytes(200)


def test_large_files_are_fetched_in_pieces(bucket, monkeypatch):
    monkeypatch.setattr(fetching, "_PIECE", 7)
    content = os.urandom(100)
    bucket.write("w/a.bin", content)
    folder = place("gs://bucket/w")
    assert in_bucket(folder)
    assert (fetching.fetch(folder, files_in(folder)) / "a.bin").read_bytes() == content


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(bucket, monkeypatch):
    bucket.write("w/a.bin", b"12")
    folder = place("gs://bucket/w")
    assert in_bucket(folder)
    full = type("Usage", (), {"free": 1})
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        fetching.fetch(folder, files_in(folder))
    assert not [*Path(fetching.copy_of(folder)).iterdir()]
