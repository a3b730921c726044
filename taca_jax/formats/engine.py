"""Weights in another layout to our parameters and back: all or nothing, a tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from taca_jax.errors import UserError
from taca_jax.formats.float8 import cast
from taca_jax.formats.key_table import Piece, Table
from taca_jax.formats.tensor_files import (
    FLOAT8,
    ArrayTensors,
    LazyTensor,
    Shape,
    Tensors,
    differences,
    summary,
)
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.stacking import Remat
from taca_jax.weights.folders import Model, Place, Stored, flat_params, load_stored, shapes_of
from taca_jax.weights.placing import StreamedArray


def match(
    table: Table, tensors: Tensors, shapes: Mapping[str, Shape]
) -> dict[str, tuple[Piece, ...]]:
    """The tensors that make up each of our parameters of these `shapes`; layers in order.

    Reads no tensor. Raises one UserError that names every key that is missing, left over, there
    twice, of another shape (theirs, as stored), or of integers.
    """
    found: dict[str, list[Piece]] = {}
    wanted = {}
    for piece in table.pieces(shapes):
        found.setdefault(piece.path, []).append(piece)
        wanted[piece.key] = piece.shape
    given = {key: shape for key, shape in tensors.shapes.items() if not table.is_ignored(key)}
    problems = differences(wanted, given)
    whole = [key for key in wanted if key in given and not _is_real(tensors.dtypes[key])]
    if whole:
        listed = summary(whole, lambda key: f"{key} is {tensors.dtypes[key]}")
        problems.append(f"{len(whole)} of integers, quantised in a way that is not read: {listed}")
    if tensors.duplicates:
        problems.append(f"{len(tensors.duplicates)} there twice: {summary(tensors.duplicates)}")
    if problems:
        raise UserError(f"{tensors.where} is not {table.name} of this size: {'; '.join(problems)}")
    return {path: tuple(pieces) for path, pieces in found.items()}


def streamed(
    table: Table, tensors: Tensors, config: Any, dtype: DTypeLike | None = None
) -> dict[str, StreamedArray]:
    """Our parameters of a model of `config`, read as they are written. Raises as `match` does.

    In `dtype`, or as stored there; float8 is bfloat16 then, which holds it exactly.
    """
    shapes = shapes_of(config)
    return {
        path: _array(tensors, shapes[path], pieces, dtype)
        for path, pieces in match(table, tensors, shapes).items()
    }


def _array(
    tensors: Tensors, shape: Shape, pieces: Sequence[Piece], dtype: DTypeLike | None
) -> StreamedArray:
    stored = np.result_type(*(_kept(tensors.dtypes[piece.key]) for piece in pieces))
    target = stored if dtype is None else jnp.dtype(dtype)
    return StreamedArray(
        shape=shape,
        dtype=target,
        pieces=_reader(tensors, pieces, target),
        stacked=pieces[0].layer is not None,
    )


def load(
    table: Table,
    tensors: Tensors,
    config: Any,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    remat: Remat = "none",
    place: Place | None = None,
    quantize: Quantization = "none",
) -> Any:
    """The model of `config` with these weights, straight onto its devices, a tensor at a time.

    `dtype` and what follows are as of `checkpoint.load_model`. Raises as `match` does.
    """
    shapes = shapes_of(config)
    found = match(table, tensors, shapes)

    def read(path: str, target: DTypeLike | None) -> StreamedArray:
        return _array(tensors, shapes[path], found[path], target)

    def matrix(path: str, layer: tuple[int, ...]) -> np.ndarray:
        piece = found[path][layer[0] if layer else 0]
        array = piece.transform.load(tensors.read(piece.key, piece.rows))
        return contiguous(cast(array, _kept(array.dtype)))

    stored = Stored(shapes, read, matrix)
    return load_stored(
        config,
        stored,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        place=place,
        quantize=quantize,
    )


def export(table: Table, model: Model) -> dict[str, np.ndarray]:
    """The model's parameters, LoRA factors left out, in the layout of the table."""
    params = {path: np.asarray(param.get_value()) for path, param in flat_params(model).items()}
    tensors = exported(table, ArrayTensors("the model", params))
    return {key: tensor.make() for key, tensor in tensors.items()}


def exported(
    table: Table, params: Tensors, dtype: DTypeLike | None = None
) -> dict[str, LazyTensor]:
    """Our parameters in the layout of the table, read as they are written.

    In `dtype`, or as stored here; parts of one tensor in what holds them all.
    """
    pieces: dict[str, list[Piece]] = {}
    for piece in table.pieces(params.shapes):
        pieces.setdefault(piece.key, []).append(piece)
    tensors = {}
    for key, parts in pieces.items():
        stored = np.result_type(*(params.dtypes[part.path] for part in parts))
        target = stored if dtype is None else jnp.dtype(dtype)
        make = partial(_theirs, params, parts, target)
        tensors[key] = LazyTensor(parts[0].shape, target, make)
    return tensors


def _theirs(params: Tensors, parts: Sequence[Piece], dtype: np.dtype) -> np.ndarray:
    """One tensor of theirs, of one of our parameters or of several."""
    arrays = []
    for part in parts:
        array = (
            params.read(part.path)
            if part.layer is None
            else params.read(part.path, slice(part.layer, part.layer + 1))[0]
        )
        arrays.append(contiguous(part.transform.store(array).astype(dtype, copy=False)))
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _kept(dtype: np.dtype) -> np.dtype:
    return np.dtype(jnp.bfloat16) if dtype in FLOAT8 else dtype


def _reader(tensors: Tensors, pieces: Sequence[Piece], dtype: np.dtype) -> Any:
    def read() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for piece in pieces:
            array = piece.transform.load(tensors.read(piece.key, piece.rows))
            yield (
                () if piece.layer is None else (piece.layer,),
                contiguous(cast(array, dtype)),
            )

    return read


TILE = 128
"""Rows and columns that are transposed at a time: they stay in the processor's caches."""


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order; a transposed matrix in a fraction of the time of numpy's own copy."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    made = np.empty(array.shape, array.dtype)
    # As integers, which numpy copies faster than types that it does not know.
    source, target = (each.view(f"u{array.itemsize}") for each in (array, made))
    packed = np.empty((TILE, TILE), source.dtype)
    for top in range(0, array.shape[0], TILE):
        for left in range(0, array.shape[1], TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            # Packed first as it lies there, so that the turn reads and writes what is at hand.
            height, width = target[tile].shape
            turned = packed[:width, :height]
            turned[:] = source[tile].T
            target[tile] = turned.T
    return made
