"""Safetensors files, single or sharded with an index, a tensor at a time as numpy."""

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file

Shape = tuple[int, ...]

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
"""What weights are stored in to save space; nothing computes in them here."""

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

_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, little-endian."""


class Tensors(Protocol):
    """Named tensors whose shapes are known before any of them is read.

    `where` is where they are from, in words; `duplicates` are names that it has twice. `read` gives
    a tensor, or of its first axes only what the slices of `part` name (None: all of an axis).
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
    """Tensors that are in memory already."""

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
class Place:
    """Where a tensor lies: the file, its name there, and its first byte."""

    path: Path
    name: str
    start: int


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of one model's files. `metadata` is the text in a single file's header."""

    where: str
    places: Mapping[str, Place]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype]
    duplicates: Sequence[str]
    metadata: Mapping[str, str]

    def read(self, name: str, *part: slice | None) -> np.ndarray:
        """One tensor, or parts of its first axes; bfloat16 and float8 come as ml_dtypes' types.

        Nothing else of the file is read.
        """
        shape = self.shapes[name]
        bounds = [
            (slice(None) if each is None else each).indices(size)[:2]
            for each, size in zip(part, shape, strict=False)
        ]
        return _read(self.places[name], bounds, shape, self.dtypes[name])


def open_tensors(path: Path) -> TensorFiles:
    """The safetensors at `path`: a file, an index (`*.index.json`), or a folder with one of either.

    Raises UserError when nothing is there, a file is truncated or damaged, a shard is missing,
    or the shards are not what their index says.
    """
    if path.is_dir():
        path = _only(path)
    if not path.is_file():
        raise UserError(f"{path} is not there; give a .safetensors file or a folder with one")
    if path.suffix == ".json":
        return _open_sharded(path)
    header = _header(path)
    return _tensor_files(path, [header], header.metadata)


def joined(where: str, parts: Mapping[str, TensorFiles]) -> TensorFiles:
    """Several files as one, names prefixed with the keys of `parts`."""
    pairs = list(parts.items())
    return TensorFiles(
        where,
        {prefix + name: place for prefix, part in pairs for name, place in part.places.items()},
        {prefix + name: shape for prefix, part in pairs for name, shape in part.shapes.items()},
        {prefix + name: dtype for prefix, part in pairs for name, dtype in part.dtypes.items()},
        [prefix + name for prefix, part in pairs for name in part.duplicates],
        {},
    )


def under(tensors: TensorFiles, prefix: str) -> TensorFiles:
    """Those whose names begin with the prefix, by what follows it."""

    def cut(named: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): value
            for name, value in named.items()
            if name.startswith(prefix)
        }

    return TensorFiles(
        tensors.where,
        cut(tensors.places),
        cut(tensors.shapes),
        cut(tensors.dtypes),
        list(cut(dict.fromkeys(tensors.duplicates))),
        tensors.metadata,
    )


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written: `pieces` are consecutive parts of it, in C order.

    A stack of layers comes layer by layer, so that no more of it need be in memory.
    """

    shape: Shape
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file, whole or not at all. Raises UserError when it cannot be written."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    lazy = {
        name: LazyTensor(array.shape, array.dtype, lambda array=array: [array])
        for name, array in arrays.items()
    }
    write_streamed(path, lazy, metadata)


def in_file_order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """The names in the order in which they are written: the widest first, as the library does, so
    that each tensor begins at a multiple of its width."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_streamed(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """As `write_tensors`, of tensors that need not fit into memory together."""
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
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with whole_file(path) as made, made.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name in names:
            for piece in tensors[name].pieces():
                file.write(_bytes(piece))
                del piece  # before the next one is made


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def shape_of(tensors: Tensors, name: str, axes: int) -> Shape:
    """The shape of one tensor from which sizes are inferred.

    Raises UserError where there is no such tensor, or it has another number of axes.
    """
    shape = tensors.shapes.get(name)
    if shape is None:
        raise UserError(f"{tensors.where} has no {name}; is it another model's?")
    if len(shape) != axes:
        raise UserError(f"{tensors.where}: {name} is {shape}; expected {axes} axes")
    return shape


def layers_of(tensors: Tensors, pattern: str) -> int:
    """One more than the highest number that the pattern's group finds in whole names; 0 if none."""
    found = (re.fullmatch(pattern, name) for name in tensors.shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def summary(
    items: Sequence[str], show: Callable[[str], str] = lambda item: item, limit: int = 6
) -> str:
    """`a, b, c`, or the first few `and 412 more`."""
    shown = ", ".join(show(item) for item in items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def differences(wanted: Mapping[str, Shape], given: Mapping[str, Shape]) -> list[str]:
    """What is missing, left over or mis-shaped in `given`, each in words; empty when it fits."""
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
    """The index in the folder, else its only safetensors file."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    choices = indices or sorted(folder.glob("*.safetensors"))
    if len(choices) == 1:
        return choices[0]
    if not choices:
        raise UserError(f"{folder} has no .safetensors file; give the folder of the weights")
    names = ", ".join(choice.name for choice in choices)
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
    headers = [_header(index.parent / shard) for shard in shards]
    held = {name for header in headers for name in header.places}
    if lost := [name for name in weight_map if name not in held]:
        raise UserError(
            f"{len(lost)} tensors that {index} names are in no shard: {summary(lost)}; "
            "download the shards again"
        )
    return _tensor_files(index, headers, {})


@dataclass(frozen=True)
class _Header:
    places: Mapping[str, Place]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype]
    metadata: Mapping[str, str]


def _tensor_files(
    where: Path, headers: Sequence[_Header], metadata: Mapping[str, str]
) -> TensorFiles:
    places = {name: place for header in headers for name, place in header.places.items()}
    shapes = {name: shape for header in headers for name, shape in header.shapes.items()}
    dtypes = {name: dtype for header in headers for name, dtype in header.dtypes.items()}
    counts = Counter(name for header in headers for name in header.places)
    duplicates = [name for name, count in counts.items() if count > 1]
    return TensorFiles(str(where), places, shapes, dtypes, duplicates, metadata)


def _header(path: Path) -> _Header:
    """What is where in a file, which the library has checked; UserError where it is damaged."""
    shapes, dtypes = {}, {}
    with _unspoilt(path), safe_open(path, framework="np") as file:
        metadata = dict(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            tensor = file.get_slice(name)
            shapes[name], dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {dtype}; expected one of {', '.join(_DTYPES)}"
            )
    with _unspoilt(path), path.open("rb") as file:
        size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        entries = json.loads(file.read(size))
        data = _LENGTH_BYTES + size
        places = {
            name: Place(path, name, data + entries[name]["data_offsets"][0]) for name in shapes
        }
    return _Header(places, shapes, {n: _DTYPES[d] for n, d in dtypes.items()}, metadata)


def _read(
    place: Place, bounds: Sequence[tuple[int, int]], shape: Shape, dtype: np.dtype
) -> np.ndarray:
    """The part of a tensor between the bounds of its first axes."""
    # Neither mapped nor through the library: pages of a mapped file count as this process's memory,
    # and its arrays are copies of copies.
    sizes = [max(stop - first, 0) for first, stop in bounds]
    made = np.empty((*sizes, *shape[len(bounds) :]), dtype)
    *outer, (first, _) = bounds or [(0, 0)]
    runs = [range(start, start + size) for (start, _), size in zip(outer, sizes, strict=False)]
    with _unspoilt(place.path), place.path.open("rb") as file:
        for index in itertools.product(*runs):
            place_in = (i - start for i, (start, _) in zip(index, outer, strict=True))
            run = made[(*place_in, ...)]
            at = 0
            for i, size in zip((*index, first), shape, strict=False):
                at = at * size + i
            at *= math.prod(shape[len(bounds) :]) if bounds else 0
            file.seek(place.start + at * dtype.itemsize)
            if file.readinto(run.reshape(-1).view(np.uint8).data) != run.nbytes:
                raise OSError("it ended early")
    return made


@contextlib.contextmanager
def _unspoilt(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}); download or write it again"
        ) from error
