"""Digests: of the content, and of nothing else."""

import os

import pytest

from taca_jax.errors import UserError
from taca_jax.evaluation import digests
from taca_jax.evaluation.digests import digest_of, digests_in, file_digest


def test_a_file_is_known_by_its_content_alone(tmp_path):
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    first.write_bytes(b"content")
    same.write_bytes(b"content")
    other.write_bytes(b"contenu")
    os.utime(same, (0, 0))
    assert file_digest(first) == file_digest(same) != file_digest(other)
    assert digests_in(first) == digests_in(same) == {".": file_digest(first)}


def test_of_a_large_file_the_size_and_the_ends_count(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE", 100)
    monkeypatch.setattr(digests, "END", 10)
    file = tmp_path / "large"

    def digest(content: bytes) -> str:
        file.write_bytes(content)
        return file_digest(file)

    zeros = digest(bytes(101))
    assert digest(b"x" + bytes(100)) != zeros
    assert digest(bytes(100) + b"x") != zeros
    assert digest(bytes(102)) != zeros
    assert digest(bytes(50) + b"x" + bytes(50)) == zeros  # as its docstring says
    assert digest(bytes(50) + b"x" + bytes(49)) != digest(bytes(100))  # this one is read whole


def test_a_folder_may_be_moved_but_not_changed(tmp_path):
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "weights").write_bytes(b"content")
    (folder / "config").write_bytes(b"{}")
    before = digest_of(folder)
    assert list(digests_in(folder)) == ["config", "transformer/weights"]
    moved = folder.rename(tmp_path / "moved")
    assert digest_of(moved) == before
    (moved / ".cache").mkdir()
    (moved / ".cache" / "downloaded").write_text("today")
    assert digest_of(moved) == before
    (moved / "config").rename(moved / "settings")
    assert digest_of(moved) != before
    with pytest.raises(UserError, match="model is not there; name a file or folder that is"):
        digest_of(folder)
