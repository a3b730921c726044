"""Arrays that come a layer at a time, onto devices: no stack of layers need fit the host."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from taca_jax.tensor_files import Shape

AT_ONCE = 2**27
"""Bytes of a stack that is put together on the host all the same: a program that fills a stack
layer by layer has to be compiled for every shape."""


@dataclass(frozen=True)
class StreamedArray:
    """An array that is read piece by piece: `pieces` yields (leading index, rest of the array).

    A stack of layers comes layer by layer, indexed (0,), (1,), ...; any other at once, indexed ().
    """

    shape: Shape
    dtype: np.dtype
    pieces: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]
    stacked: bool


def put(array: StreamedArray, where: Sharding) -> jax.Array:
    """The array on its devices. Of a large stack there is one layer on the host at a time."""
    if not array.stacked or np.prod(array.shape) * array.dtype.itemsize <= AT_ONCE:
        return placed(_whole(array), where)
    made = _zeros(array.shape, array.dtype, where)
    for (layer,), piece in array.pieces():
        made = _with_layer(made, placed(piece, of_layer(where)), layer, where)
        jax.block_until_ready(made)  # else layers would pile up on the host, on their way
    return made


def _whole(array: StreamedArray) -> np.ndarray:
    if not array.stacked:
        ((_, whole),) = array.pieces()
        return whole
    whole = np.empty(array.shape, array.dtype)
    for index, piece in array.pieces():
        whole[index] = piece
    return whole


def placed(array: np.ndarray, where: Sharding) -> jax.Array:
    """Of several processes each puts what its devices have."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def of_layer(where: Sharding) -> Sharding:
    """Where one layer of a stack lies; a stack's first axis is never shared."""
    if isinstance(where, NamedSharding):
        return NamedSharding(where.mesh, P(*where.spec[1:]))
    return where


@jax.jit(static_argnames=("shape", "dtype", "where"))
def _zeros(shape: Shape, dtype: np.dtype, where: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), where)


@jax.jit(static_argnames=("where",), donate_argnames=("stack",))
def _with_layer(stack: jax.Array, piece: jax.Array, layer: int, where: Sharding) -> jax.Array:
    made = jax.lax.dynamic_update_index_in_dim(stack, piece, layer, 0)
    return jax.lax.with_sharding_constraint(made, where)
