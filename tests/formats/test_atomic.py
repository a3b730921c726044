"""Writing whole or not at all: what kills leave, and whom the next writer cleans up after."""

import fcntl
import subprocess
import sys

import pytest

from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file, whole_folder


def write(path, text):
    with whole_folder(path) as folder:
        (folder / "text").write_text(text)


def names(folder):
    return sorted(each.name for each in folder.iterdir())


WRITER = """
import os, pathlib, signal, sys, time
from taca_jax.formats.atomic import whole_file, whole_folder

kind, path = sys.argv[1], pathlib.Path(sys.argv[2])
rename = pathlib.Path.rename

def killed_before_the_new_comes(self, target):
    if target == path:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

if kind == "between the renames":
    pathlib.Path.rename = killed_before_the_new_comes
with (whole_file if kind == "file" else whole_folder)(path) as made:
    (made if kind == "file" else made / "text").write_text("half")
    if kind != "between the renames":
        print("half", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def start():
    """Starts the program above; what is left of it is killed in the end."""
    writers = []

    def start(kind, path):
        command = [sys.executable, "-c", WRITER, kind, str(path)]
        writers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert writers[-1].stdout.readline() == (b"" if "between" in kind else b"half\n")
        return writers[-1]

    yield start
    for writer in writers:
        kill(writer)


def kill(writer):
    writer.kill()
    writer.wait()
    writer.stdout.close()


def test_the_next_writer_removes_what_the_dead_left_and_not_what_the_living_write(start, tmp_path):
    path = tmp_path / "m"
    dead, living = start("folder", path), start("folder", path)
    other = start("folder", tmp_path / "m.x")
    kill(dead)
    kill(other)
    assert len(names(tmp_path)) == 3
    write(path, "whole")
    assert (path / "text").read_text() == "whole"
    left = [name for name in names(tmp_path) if name.endswith(".partial")]
    assert len(left) == 2  # of the living, and of another destination
    assert all((tmp_path / name / "new" / "text").read_text() == "half" for name in left)
    kill(living)
    write(path, "whole again")
    write(tmp_path / "m.x", "whole")
    assert names(tmp_path) == ["m", "m.x"]


def test_files_too(start, tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_text("old")
    kill(start("file", path))
    assert path.read_text() == "old"
    with whole_file(path) as made:
        made.write_text("new")
    assert names(tmp_path) == ["lora.safetensors"]
    assert path.read_text() == "new"


def test_a_writer_in_the_same_process_lives_too(tmp_path):
    with whole_folder(tmp_path / "m") as outer:
        (outer / "text").write_text("outer")
        write(tmp_path / "m", "inner")
        assert (tmp_path / "m" / "text").read_text() == "inner"
    assert (tmp_path / "m" / "text").read_text() == "outer"
    assert names(tmp_path) == ["m"]


def test_a_kill_between_moving_the_old_away_and_the_new_in_loses_nothing(start, tmp_path):
    path = tmp_path / "m"
    write(path, "old")
    kill(start("between the renames", path))
    assert not path.exists()
    with pytest.raises(UserError, match="could not be written"), whole_folder(path):
        raise OSError("no room")
    assert (path / "text").read_text() == "old"
    assert names(tmp_path) == ["m"]


def test_where_there_are_no_locks_nothing_is_taken_for_dead(start, tmp_path, monkeypatch):
    path = tmp_path / "m"
    kill(start("folder", path))

    def refuse(*_):
        raise OSError("not supported")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        write(path, "whole")
        assert len(names(tmp_path)) == 2
        with whole_folder(path) as unlocked:
            (unlocked / "text").write_text("unlocked")
            patch.undo()
            write(path, "locked")
            assert unlocked.exists()
    assert (path / "text").read_text() == "unlocked"
    assert names(tmp_path) == ["m"]


def test_a_block_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "m"
    write(path, "old")

    def stopped():
        with whole_folder(path) as folder:
            (folder / "text").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (path / "text").read_text() == "old"
    assert names(tmp_path) == ["m"]
