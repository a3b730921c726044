"""Converted model folders, a tensor (or a layer of a stack) at a time, without a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import Shape, Tensors, open_tensors
from taca_jax.weights.folders import PARAMS, SAFETENSORS


@dataclass(frozen=True)
class OrbaxTensors:
    """The arrays that Orbax stores in a folder each."""

    where: str
    arrays: Mapping[str, ts.TensorStore]
    duplicates: tuple[str, ...] = ()

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(array.shape) for name, array in self.arrays.items()}

    @property
    def dtypes(self) -> Mapping[str, np.dtype]:
        return {name: array.dtype.numpy_dtype for name, array in self.arrays.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        array = self.arrays[name]
        try:
            return np.asarray((array if rows is None else array[rows]).read().result())
        except ValueError as error:
            raise _damaged(self.where, error) from error


def open_stored(folder: Path) -> Tensors:
    """The parameters of a model folder by dotted path; empty where a model has none.

    Raises UserError where they are damaged.
    """
    if (folder / SAFETENSORS).is_file():
        return open_tensors(folder / SAFETENSORS)
    arrays = {}
    if (folder / PARAMS).is_dir():
        for array in sorted(each for each in (folder / PARAMS).iterdir() if each.is_dir()):
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array}/"}}
            try:
                arrays[array.name] = ts.open(spec, read=True).result()
            except ValueError as error:
                raise _damaged(str(array), error) from error
    return OrbaxTensors(str(folder), arrays)


def _damaged(where: str, error: ValueError) -> UserError:
    reason = str(error).partition("\n")[0].partition(" [")[0]
    return UserError(f"{where} is incomplete or damaged ({reason}); convert it again")
