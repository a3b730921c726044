"""Converts weights of another layout to our parameters and back, one tensor at a time.

A conversion fails unless it accounts for every tensor."""

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
    LazyTensor,
    Shape,
    Tensors,
    differences,
    summary,
)
from taca_jax.nn.kinds import shapes_of


def match(
    table: Table, tensors: Tensors, shapes: Mapping[str, Shape]
) -> dict[str, tuple[Piece, ...]]:
    """The tensors that make up each of our parameters of these `shapes`, layers in order.

    Reads no tensor. Raises one UserError that lists all keys that are missing, left over,
    duplicate, mis-shaped (with the shapes as stored), or of integer dtype.
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
) -> dict[str, LazyTensor]:
    """The parameters of a model of `config`, each read when it is written.

    dtype: of the result; None keeps the stored dtype, with bfloat16, which is exact, for float8.
    Raises UserError as `match` does.
    """
    shapes = shapes_of(config)
    made = {}
    for path, pieces in match(table, tensors, shapes).items():
        target = stored_dtype(tensors, pieces) if dtype is None else jnp.dtype(dtype)
        made[path] = LazyTensor(shapes[path], target, partial(_ours, tensors, pieces, target))
    return made


def stored_dtype(tensors: Tensors, pieces: Sequence[Piece]) -> np.dtype:
    """The dtype that represents all of these tensors exactly; bfloat16 for float8."""
    dtypes = (tensors.dtypes[piece.key] for piece in pieces)
    return np.result_type(*(np.dtype(jnp.bfloat16) if each in FLOAT8 else each for each in dtypes))


def _ours(tensors: Tensors, pieces: Sequence[Piece], dtype: np.dtype) -> Iterator[np.ndarray]:
    for piece in pieces:
        array = piece.transform.load(tensors.read(piece.key, piece.rows))
        yield contiguous(cast(array, dtype))


def exported(
    table: Table, params: Tensors, dtype: DTypeLike | None = None
) -> dict[str, LazyTensor]:
    """Our parameters in the layout of the table, each read when it is written.

    dtype: of the result; None keeps the stored dtype, or for fused tensors the one that represents
    all of their parts.
    """
    pieces: dict[str, list[Piece]] = {}
    for piece in table.pieces(params.shapes):
        pieces.setdefault(piece.key, []).append(piece)
    tensors = {}
    for key, parts in pieces.items():
        stored = np.result_type(*(params.dtypes[part.path] for part in parts))
        target = stored if dtype is None else jnp.dtype(dtype)
        tensors[key] = LazyTensor(parts[0].shape, target, partial(_theirs, params, parts, target))
    return tensors


def _theirs(params: Tensors, parts: Sequence[Piece], dtype: np.dtype) -> Iterator[np.ndarray]:
    """One tensor of theirs: one of our parameters, or several concatenated."""
    for part in parts:
        if part.layer is None:
            array = params.read(part.path)
        else:
            array = params.read(part.path, slice(part.layer, part.layer + 1))[0]
        yield contiguous(part.transform.store(array).astype(dtype, copy=False))


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


TILE = 128
"""Rows and columns that are transposed at a time, so that they stay in the CPU's caches."""


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order; for transposed matrices much faster than numpy's own copy."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    made = np.empty(array.shape, array.dtype)
    # Viewed as integers, which numpy copies faster than ml_dtypes' types.
    source, target = (each.view(f"u{array.itemsize}") for each in (array, made))
    packed = np.empty((TILE, TILE), source.dtype)
    for top in range(0, array.shape[0], TILE):
        for left in range(0, array.shape[1], TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            # Copied to a contiguous buffer first, so that the transpose works within the cache.
            height, width = target[tile].shape
            buffer = packed[:width, :height]
            buffer[:] = source[tile].T
            target[tile] = buffer.T
    return made
