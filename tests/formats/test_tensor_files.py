"""Safetensors files as we write them: what the library would write, a tensor at a time."""

import weakref

import ml_dtypes
import numpy as np
from safetensors.numpy import save

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
        return array

    tensors = {name: LazyTensor((4,), np.dtype(np.float32), make) for name in "abc"}
    write_streamed(tmp_path / "x.safetensors", tensors)
    assert len(made) == 3
    assert open_tensors(tmp_path / "x.safetensors").shapes == dict.fromkeys("abc", (4,))
