"""Safetensors files as we write them: what the library would write, a tensor at a time."""

import io
import itertools
import json
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import LazyTensor, open_tensors, write_streamed, write_tensors


def test_files_are_those_of_the_library(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.ones(3, ml_dtypes.bfloat16),
        "none": np.zeros((0, 2), np.int64),
        "one": np.array(3.0),
        "f8": np.ones((2, 2), ml_dtypes.float8_e5m2),
        "\u00fc": np.arange(3, dtype=np.uint8),
    }
    file = tmp_path / "x.safetensors"
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    for metadata in (None, {"said": '"\u00fc"'}):
        write_tensors(file, tensors, metadata)
        assert file.read_bytes() == save(ordered, metadata)
    read = open_tensors(file)
    for name, tensor in tensors.items():
        assert read.read(name).tobytes() == tensor.tobytes()


def test_a_tensor_is_made_when_it_is_written(tmp_path):
    """And let go before the next one is."""
    made = []

    def make():
        assert not made or made[-1]() is None
        array = np.ones(4, np.float32)
        made.append(weakref.ref(array))
        yield array

    tensors = {name: LazyTensor((4,), np.dtype(np.float32), make) for name in "abc"}
    write_streamed(tmp_path / "x.safetensors", tensors)
    assert len(made) == 3
    assert open_tensors(tmp_path / "x.safetensors").shapes == dict.fromkeys("abc", (4,))


def some_tensors() -> dict[str, np.ndarray]:
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "c": np.zeros(2, np.float16),
    }


def test_files_are_read_a_tensor_at_a_time(tmp_path):
    write_tensors(tmp_path / "x.safetensors", some_tensors(), {"made": "here"})
    for path in (tmp_path, tmp_path / "x.safetensors"):
        tensors = open_tensors(path)
        assert tensors.metadata == {"made": "here"}
        for name, array in some_tensors().items():
            assert tensors.shapes[name] == array.shape
            assert tensors.dtypes[name] == tensors.read(name).dtype == array.dtype
            np.testing.assert_array_equal(tensors.read(name), array)


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes that are read of tensors, file by file."""
    counts = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            counts.append(len(buffer))
            return super().readinto(buffer)

    monkeypatch.setattr(Path, "open", lambda path, mode: Counted(path, mode))
    return counts


SLICES = (None, slice(None), slice(1, 2), slice(1, None), slice(0, 0), slice(-1, None))


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_parts_of_a_tensor_are_read_alone(tmp_path, bytes_read, dtype):
    """Any slices of the first axes, and no byte beside them."""
    arrays = {"a": np.arange(60).reshape(3, 4, 5).astype(dtype), "b": np.ones(7, dtype)}
    write_tensors(tmp_path / "x.safetensors", arrays)
    tensors = open_tensors(tmp_path / "x.safetensors")
    for count in range(4):
        for part in itertools.product(SLICES, repeat=count):
            bytes_read.clear()
            made = tensors.read("a", *part)
            expected = arrays["a"][tuple(slice(None) if each is None else each for each in part)]
            assert made.dtype == dtype
            np.testing.assert_array_equal(made, expected, err_msg=str(part))
            assert sum(bytes_read) == expected.nbytes


def sharded(folder: Path) -> Path:
    arrays = some_tensors()
    write_tensors(folder / "x-1-of-2.safetensors", {"a": arrays["a"]})
    write_tensors(folder / "x-2-of-2.safetensors", {"b": arrays["b"], "c": arrays["c"]})
    index = folder / "x.safetensors.index.json"
    shards = {"a": "x-1-of-2.safetensors", "b": "x-2-of-2.safetensors", "c": "x-2-of-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return index


def test_shards_are_one_model(tmp_path):
    index = sharded(tmp_path)
    for path in (tmp_path, index):
        tensors = open_tensors(path)
        assert set(tensors.shapes) == {"a", "b", "c"}
        for name, array in some_tensors().items():
            np.testing.assert_array_equal(tensors.read(name), array)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_tensors(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_not_there_or_not_whole(tmp_path):
    assert "is not there" in refused(tmp_path / "x.safetensors")
    assert "has no .safetensors file" in refused(tmp_path)
    file = tmp_path / "x.safetensors"
    write_tensors(file, some_tensors())
    whole = file.read_bytes()
    for cut in (0, 4, 40, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert f"{file} is truncated or damaged" in refused(file)
    file.write_bytes(b"\xff" * 200)
    assert "is truncated or damaged" in refused(file)
    write_tensors(tmp_path / "y.safetensors", some_tensors())
    assert "more than one set of weights (x.safetensors, y.safetensors)" in refused(tmp_path)


def test_shards_that_do_not_fit_their_index(tmp_path):
    index = sharded(tmp_path)
    second = tmp_path / "x-2-of-2.safetensors"
    second.rename(tmp_path / "aside")
    assert "1 of the 2 shards" in refused(index)
    assert "x-2-of-2.safetensors" in refused(index)
    write_tensors(second, {"a": some_tensors()["a"], "b": some_tensors()["b"]})
    assert "1 tensors that" in refused(index)
    assert "are in no shard: c" in refused(index)
    write_tensors(second, some_tensors())
    assert open_tensors(index).duplicates == ["a"]
    index.write_text("{}")
    assert "is no index of shards" in refused(index)


def test_types_that_are_not_weights_are_refused(tmp_path):
    save_file({"a": np.zeros(3, np.int16)}, tmp_path / "x.safetensors")
    assert "a is stored as I16; expected one of F64" in refused(tmp_path)
