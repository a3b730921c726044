"""Parameters from where they are kept onto their devices, a layer and a shard at a time.

Neither a stack of layers nor what other processes' devices hold need fit this host's memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from taca_jax.attention import Implementation
from taca_jax.formats.tensor_files import Shape
from taca_jax.nn.kinds import abstract_model, filled, flat_params, kind_of, shapes_of
from taca_jax.nn.layers import Quantized
from taca_jax.nn.low_bit import Codes, Quantization, Scales
from taca_jax.nn.quantization import encode, quantize, shapes
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.rules import parameter_sharding

AT_ONCE = 2**27
"""Bytes of a stack that is put together on the host all the same: a program that fills a stack
layer by layer has to be compiled for every shape."""

Index = tuple[slice, ...]
"""A part of an array: one slice an axis."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    dtype: of activations.
    param_dtype: of parameters; None as they are stored.
    mesh: over which parameters are shared as the sharding table of their kind says; None puts all
      on the first device.
    quantize: what the kernels of blocks are kept in, encoded a layer at a time as they are read.
    remat, attention: of a transformer; what its backward pass recomputes, and the implementation of
      its joint attention.
    """

    dtype: DTypeLike
    param_dtype: DTypeLike | None = None
    mesh: Mesh | None = None
    quantize: Quantization = "none"
    remat: Remat = "none"
    attention: Implementation = "auto"


@dataclass(frozen=True)
class StoredParameters:
    """The parameters of a model where they are kept, by dotted path.

    dtypes: what a model has them in that asks for no other.
    read: (path, part of it) -> that part, on the host, in that dtype or a more exact one. Stacks of
    layers are read a layer at a time.
    """

    dtypes: Mapping[str, np.dtype]
    read: Callable[[str, Index], np.ndarray]


def load_parameters(config: Any, stored: StoredParameters, options: LoadOptions) -> Any:
    """The model of a config with the parameters that `stored` has, which are of its shapes.

    Raises UserError for a model that cannot be quantised.
    """
    kind, wanted = kind_of(config), shapes_of(config)
    model = abstract_model(
        config, dtype=options.dtype, remat=options.remat, attention=options.attention
    )

    def sharding(path: str, shape: Shape) -> Sharding:
        return parameter_sharding(kind.sharding, path, shape, options.mesh)

    arrays: dict[str, jax.Array] = {}
    quantize(model, kind, options.quantize)
    for path, param in flat_params(model).items():
        layer = path.removesuffix("_scale")
        if isinstance(param, Quantized) and path != layer:
            arrays[layer], arrays[path] = _quantized(
                lambda part, layer=layer: stored.read(layer, part),
                wanted[layer],
                options.quantize,
                path=layer,
                codes_at=sharding(layer, wanted[layer]),
                scales_at=sharding(path, param.shape),
            )
    for path, shape in wanted.items():
        if path not in arrays:
            dtype = jnp.dtype(options.param_dtype or stored.dtypes[path])
            arrays[path] = on_devices(
                lambda part, path=path, dtype=dtype: stored.read(path, part).astype(
                    dtype, copy=False
                ),
                shape,
                dtype,
                sharding(path, shape),
            )
    return filled(model, arrays)


def on_devices(
    read: Callable[[Index], np.ndarray], shape: Shape, dtype: np.dtype, where: Sharding
) -> jax.Array:
    """The array that `read` gives parts of. Of a large stack there is one layer on the host at a
    time, and of anything only what this process's devices hold."""
    if len(shape) < 3 or np.prod(shape) * dtype.itemsize <= AT_ONCE:
        return _placed(read, shape, where)
    made = _zeros(shape, dtype, where)
    for layer in range(shape[0]):
        piece = _placed(_of_layer(read, layer), shape[1:], _layer_sharding(where))
        made = _with_layer(made, piece, layer, where)
        jax.block_until_ready(made)  # else layers would pile up on the host, on their way
    return made


def _of_layer(read: Callable[[Index], np.ndarray], layer: int) -> Callable[[Index], np.ndarray]:
    return lambda part: read((slice(layer, layer + 1), *part))[0]


def _placed(read: Callable[[Index], np.ndarray], shape: Shape, where: Sharding) -> jax.Array:
    """What this process's devices hold is read at once, from the first of it to the last."""
    held = where.addressable_devices_indices_map(shape).values()
    axes = list(zip(*(_ranges(index, shape) for index in held), strict=True))
    first = [min(each.start for each in axis) for axis in axes]
    last = [max(each.stop for each in axis) for axis in axes]
    found = read(tuple(map(slice, first, last)))

    def part(index: Index | None) -> np.ndarray:
        ranges = zip(_ranges(index, shape), first, strict=True)
        return found[tuple(slice(each.start - at, each.stop - at) for each, at in ranges)]

    return jax.make_array_from_callback(shape, where, part)


def _ranges(index: Index | None, shape: Shape) -> list[range]:
    """What a part of an array covers of each axis; None is all."""
    slices = (slice(None),) * len(shape) if index is None else index
    return [range(size)[each] for each, size in zip(slices, shape, strict=True)]


def _layer_sharding(where: Sharding) -> Sharding:
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


def _quantized(
    read: Callable[[Index], np.ndarray],
    shape: Shape,
    to: Quantization,
    *,
    path: str,
    codes_at: Sharding,
    scales_at: Sharding,
) -> tuple[Codes, Scales]:
    """A kernel's codes and scales, put together on the devices from what `read` gives.

    Of a stack one layer at a time is read and encoded, so that neither host nor devices ever hold
    more of the kernel than that.
    """
    stack = shape[:-2]
    write = _writer(to, codes_at, scales_at)
    codes, scales = shapes(to, path, shape)
    made = (
        jnp.zeros(codes.shape, codes.dtype, device=codes_at),
        jnp.zeros(scales.shape, scales.dtype, device=scales_at),
    )
    at = _layer_sharding(codes_at) if stack else codes_at
    for layer in range(stack[0]) if stack else [None]:
        part = read if layer is None else _of_layer(read, layer)
        kernel = _placed(part, shape[-2:], at)
        jax.block_until_ready(made)  # one layer is read while the one before is encoded, no more
        made = write(made, kernel, np.array([] if layer is None else [layer], np.int32))
    return made


@cache
def _writer(to: Quantization, codes_at: Sharding, scales_at: Sharding) -> Any:
    """Encodes one layer's kernel into its place among the codes and scales of all, in place."""

    def write(
        made: tuple[Codes, Scales], kernel: Float[Array, "i o"], layer: Int[Array, " stack"]
    ) -> tuple[Codes, Scales]:
        start = (*layer, 0, 0)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            rows = part.reshape(*(1,) * len(layer), *part.shape)
            return jax.lax.dynamic_update_slice(whole, rows, start)

        codes, scales = (put(*pair) for pair in zip(made, encode(kernel, to), strict=True))
        return codes, scales

    return jax.jit(write, donate_argnames="made", out_shardings=(codes_at, scales_at))
