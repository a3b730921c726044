"""Safetensors files, single or sharded with an index, read one tensor at a time as numpy arrays."""

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.formats.weight_sets import weight_sets
from taca_jax.hub.ids import hint
from taca_jax.storage.places import Place

Shape = tuple[int, ...]

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
"""Dtypes that weights are stored in to save space; nothing here computes in them."""

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": FLOAT8[0],
    "F8_E5M2": FLOAT8[1],
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, little-endian."""


class Tensors(Protocol):
    """Named tensors whose shapes are known before any of them is read.

    where: their source, for messages. duplicates: names that occur twice. read: returns a tensor
    or a part of it; `part` are slices of its first axes (None: the whole axis).
    """

    @property
    def where(self) -> str: ...
    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def dtypes(self) -> Mapping[str, np.dtype]: ...
    @property
    def duplicates(self) -> Sequence[str]: ...
    def read(self, name: str, *part: slice | None) -> np.ndarray: ...


@dataclass(frozen=True)
class ArrayTensors:
    """Tensors that are already in memory."""

    where: str
    arrays: Mapping[str, np.ndarray]
    duplicates: Sequence[str] = ()

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: array.shape for name, array in self.arrays.items()}

    @property
    def dtypes(self) -> Mapping[str, np.dtype]:
        return {name: array.dtype for name, array in self.arrays.items()}

    def read(self, name: str, *part: slice | None) -> np.ndarray:
        return self.arrays[name][tuple(slice(None) if each is None else each for each in part)]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: the file, its name there, its first byte, its shape and dtype."""

    path: Path
    name: str
    start: int
    shape: Shape
    dtype: np.dtype


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of one model's files, by name. `metadata` is that of a single file's header."""

    where: str
    stored: Mapping[str, StoredTensor]
    duplicates: Sequence[str]
    metadata: Mapping[str, str]
    shapes: Mapping[str, Shape] = field(init=False)
    dtypes: Mapping[str, np.dtype] = field(init=False)

    def __post_init__(self):
        for name in ("shape", "dtype"):
            values = {key: getattr(tensor, name) for key, tensor in self.stored.items()}
            object.__setattr__(self, f"{name}s", values)  # the class is frozen

    def read(self, name: str, *part: slice | None) -> np.ndarray:
        """One tensor, or a part of its first axes; bfloat16 and float8 are ml_dtypes' types.

        Nothing else of the file is read.
        """
        stored = self.stored[name]
        bounds = [
            (slice(None) if each is None else each).indices(size)[:2]
            for each, size in zip(part, stored.shape, strict=False)
        ]
        return _read(stored, bounds)


@dataclass(frozen=True)
class TensorHeaders(TensorFiles):
    """The tensors of files of which only headers are read, to check what needs no values: all are
    of ones, except single numbers, and take no memory."""

    def read(self, name: str, *part: slice | None) -> np.ndarray:
        stored = self.stored[name]
        if math.prod(stored.shape) == 1:
            return super().read(name, *part)
        ones = np.broadcast_to(np.ones((), stored.dtype), stored.shape)
        return ones[tuple(slice(None) if each is None else each for each in part)]


def headers_of(tensors: TensorFiles) -> TensorHeaders:
    """The same files, of which only headers are read."""
    return TensorHeaders(tensors.where, tensors.stored, tensors.duplicates, tensors.metadata)


def open_tensors(path: Path) -> TensorFiles:
    """The safetensors at `path`: a file, an index (`*.index.json`), or a folder with one of either.

    Raises UserError if nothing is there, a file is truncated or damaged, a shard is missing, or the
    shards do not match their index.
    """
    if path.is_dir():
        path = _only(path)
    if not path.is_file():
        raise UserError(
            f"{path} is not there; give a .safetensors file or a folder with one; {hint(path)}"
        )
    if path.suffix == ".json":
        return _open_sharded(path)
    return _open_file(path)


def joined(where: str, parts: Sequence[tuple[str, TensorFiles]]) -> TensorFiles:
    """Several files as one, each with a prefix for its names."""
    named = [(prefix + name, t) for prefix, part in parts for name, t in part.stored.items()]
    duplicates = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    return TensorFiles(where, dict(named), duplicates, {})


def under(tensors: TensorFiles, prefix: str) -> TensorFiles:
    """The tensors whose names begin with the prefix, which is removed from their names."""
    stored = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.stored.items()
        if name.startswith(prefix)
    }
    duplicates = [n.removeprefix(prefix) for n in tensors.duplicates if n.startswith(prefix)]
    return TensorFiles(tensors.where, stored, duplicates, tensors.metadata)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed as it is written: `pieces` yields consecutive parts in C order.

    A stack of layers is yielded layer by layer, so that only one layer must fit into memory.
    """

    shape: Shape
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Place, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file atomically. Raises UserError if it cannot be written."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    lazy = {
        name: LazyTensor(array.shape, array.dtype, lambda array=array: [array])
        for name, array in arrays.items()
    }
    write_streamed(path, lazy, metadata)


def in_file_order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """The names in the order of writing: widest dtypes first, as the safetensors library does, so
    that each tensor begins at a multiple of its item size."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_streamed(
    path: Place, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Like `write_tensors`, for tensors that need not fit into memory together."""
    stored_as = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    names = in_file_order(tensors)
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": stored_as[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with whole_file(path) as made, made.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name in names:
            for piece in tensors[name].pieces():
                file.write(_bytes(piece))
                del piece  # before the next one is made


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def shape_of(tensors: Tensors, name: str, axes: int) -> Shape:
    """The shape of one tensor, to infer a config from.

    Raises UserError if there is no such tensor, or if it has another number of axes.
    """
    shape = tensors.shapes.get(name)
    if shape is None:
        raise UserError(f"{tensors.where} has no {name}; is it another model's?")
    if len(shape) != axes:
        raise UserError(f"{tensors.where}: {name} is {shape}; expected {axes} axes")
    return shape


def layers_of(tensors: Tensors, pattern: str) -> int:
    """The number of layers: one more than the highest number that the pattern's group matches in
    any name; 0 if none."""
    found = (re.fullmatch(pattern, name) for name in tensors.shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def summary(
    items: Sequence[str], show: Callable[[str], str] = lambda item: item, limit: int = 6
) -> str:
    """`a, b, c`; of long lists only the first items, as in `a, b and 412 more`."""
    shown = ", ".join(show(item) for item in items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def differences(wanted: Mapping[str, Shape], given: Mapping[str, Shape]) -> list[str]:
    """Messages about missing, left-over and mis-shaped names in `given`; empty if all fits."""
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    shapes = [name for name in wanted if name in given and tuple(given[name]) != wanted[name]]
    found = []
    if missing:
        found.append(f"{len(missing)} missing: {summary(missing)}")
    if extra:
        found.append(f"{len(extra)} left over: {summary(extra)}")
    if shapes:
        listed = summary(shapes, lambda n: f"{n} is {tuple(given[n])} instead of {wanted[n]}")
        found.append(f"{len(shapes)} of another shape: {listed}")
    return found


def _only(folder: Path) -> Path:
    """The index in the folder, else its only safetensors file; of several precisions one."""
    choices = weight_sets([file.name for file in folder.iterdir() if file.is_file()])
    if len(choices) == 1:
        return folder / choices[0].entry
    if not choices:
        raise UserError(f"{folder} has no .safetensors file; give the folder of the weights")
    names = ", ".join(choice.entry for choice in choices)
    raise UserError(f"{folder} has more than one set of weights ({names}); give one of them")


def _open_sharded(index: Path) -> TensorFiles:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{index} is no index of shards ({error}); download it again") from None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and "\0" not in name for name in weight_map.values()
    ):
        raise UserError(
            f"{index} is no index of shards (its weight_map names no files); download it again"
        )
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(shards)} shards that {index} names are missing: "
            f"{summary(absent)}; download them again"
        )
    tensors = joined(str(index), [("", _open_file(index.parent / shard)) for shard in shards])
    if lost := [name for name in weight_map if name not in tensors.stored]:
        raise UserError(
            f"{len(lost)} tensors that {index} names are in no shard: {summary(lost)}; "
            "download the shards again"
        )
    return tensors


def _open_file(path: Path) -> TensorFiles:
    """A single file, whose header the library checks. Raises UserError if it is damaged."""
    shapes, dtypes = {}, {}
    with _damage_as_user_error(path), safe_open(path, framework="np") as file:
        metadata = dict(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            tensor = file.get_slice(name)
            shapes[name], dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {dtype}; expected one of {', '.join(_DTYPES)}"
            )
    with _damage_as_user_error(path), path.open("rb") as file:
        size = int.from_bytes(file.read(LENGTH_BYTES), "little")
        entries = json.loads(file.read(size))
        data = LENGTH_BYTES + size
        stored = {
            name: StoredTensor(
                path, name, data + entries[name]["data_offsets"][0], shape, _DTYPES[dtypes[name]]
            )
            for name, shape in shapes.items()
        }
    return TensorFiles(str(path), stored, [], metadata)


def _read(stored: StoredTensor, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The part of a tensor between the bounds of its first axes."""
    shape, dtype = stored.shape, stored.dtype
    # Memory-mapped pages would count as this process's memory, and the library copies arrays twice.
    sizes = [max(stop - first, 0) for first, stop in bounds]
    made = np.empty((*sizes, *shape[len(bounds) :]), dtype)
    *outer, (first, _) = bounds or [(0, 0)]
    runs = [range(start, start + size) for (start, _), size in zip(outer, sizes, strict=False)]
    with _damage_as_user_error(stored.path), stored.path.open("rb") as file:
        for index in itertools.product(*runs):
            target = (i - start for i, (start, _) in zip(index, outer, strict=True))
            run = made[(*target, ...)]
            offset = 0
            for i, size in zip((*index, first), shape, strict=False):
                offset = offset * size + i
            offset *= math.prod(shape[len(bounds) :]) if bounds else 0
            file.seek(stored.start + offset * dtype.itemsize)
            if file.readinto(run.reshape(-1).view(np.uint8).data) != run.nbytes:
                raise OSError("it ended early")
    return made


@contextlib.contextmanager
def _damage_as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}); download or write it again"
        ) from error
