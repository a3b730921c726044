"""Loads parameters onto their devices, one layer and one shard at a time.

The host's memory need not hold a whole stack of layers, nor the shards of other processes.
"""

import math
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
from taca_jax.telling.bars import bar

AT_ONCE = 2**27
"""Stacks of up to so many bytes are assembled on the host: filling a stack on the device layer by
layer needs a program to be compiled for every shape."""

Index = tuple[slice, ...]
"""A part of an array: one slice an axis."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    dtype: of activations.
    param_dtype: of parameters; None keeps the stored dtype.
    mesh: parameters are sharded over it according to the sharding table of their kind; None puts
      all on the first device.
    quantize: number format of the kernels of blocks, encoded a layer at a time as they are read.
    remat, attention: of a transformer: what its backward pass recomputes, and the implementation
      of its joint attention.
    """

    dtype: DTypeLike
    param_dtype: DTypeLike | None = None
    mesh: Mesh | None = None
    quantize: Quantization = "none"
    remat: Remat = "none"
    attention: Implementation = "auto"


@dataclass(frozen=True)
class StoredParameters:
    """The parameters of a model in storage, by dotted path.

    dtypes: of the loaded parameters, unless the options name another.
    read: (path, part of it) -> that part as a host array, in that dtype or a more precise one.
      Large stacks of layers are read one layer at a time.
    """

    dtypes: Mapping[str, np.dtype]
    read: Callable[[str, Index], np.ndarray]


def load_parameters(config: Any, stored: StoredParameters, options: LoadOptions) -> Any:
    """The model of a config with the stored parameters, which must have its shapes.

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
    stored_bytes = {
        path: math.prod(shape) * stored.dtypes[path].itemsize for path, shape in wanted.items()
    }
    loading = f"loading the {kind.role.replace('_', ' ')}"
    with bar(loading, sum(stored_bytes.values()), "bytes") as advance:
        for path, param in flat_params(model).items():
            layer = path.removesuffix("_scale")
            if isinstance(param, Quantized) and path != layer:
                arrays[layer], arrays[path] = _quantized(
                    lambda part, layer=layer: stored.read(layer, part),
                    wanted[layer],
                    options.quantize,
                    path=layer,
                    codes_sharding=sharding(layer, wanted[layer]),
                    scales_sharding=sharding(path, param.shape),
                )
                advance(stored_bytes[layer])
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
                advance(stored_bytes[path])
    return filled(model, arrays)


def on_devices(
    read: Callable[[Index], np.ndarray], shape: Shape, dtype: np.dtype, sharding: Sharding
) -> jax.Array:
    """The array whose parts `read` returns. The host holds only this process's shards, and of a
    large stack one layer at a time."""
    if len(shape) < 3 or np.prod(shape) * dtype.itemsize <= AT_ONCE:
        return _placed(read, shape, sharding)
    made = _zeros(shape, dtype, sharding)
    for layer in range(shape[0]):
        piece = _placed(_of_layer(read, layer), shape[1:], _layer_sharding(sharding))
        made = _with_layer(made, piece, layer, sharding)
        jax.block_until_ready(made)  # otherwise pending layers would accumulate on the host
    return made


def _of_layer(read: Callable[[Index], np.ndarray], layer: int) -> Callable[[Index], np.ndarray]:
    return lambda part: read((slice(layer, layer + 1), *part))[0]


def _placed(read: Callable[[Index], np.ndarray], shape: Shape, sharding: Sharding) -> jax.Array:
    """Places an array on devices; one read covers all shards of this process."""
    held = sharding.addressable_devices_indices_map(shape).values()
    axes = list(zip(*(_ranges(index, shape) for index in held), strict=True))
    first = [min(each.start for each in axis) for axis in axes]
    last = [max(each.stop for each in axis) for axis in axes]
    found = read(tuple(map(slice, first, last)))

    def part(index: Index | None) -> np.ndarray:
        ranges = zip(_ranges(index, shape), first, strict=True)
        return found[tuple(slice(each.start - at, each.stop - at) for each, at in ranges)]

    return jax.make_array_from_callback(shape, sharding, part)


def _ranges(index: Index | None, shape: Shape) -> list[range]:
    """The range of each axis that a part of an array covers; None is the whole array."""
    slices = (slice(None),) * len(shape) if index is None else index
    return [range(size)[each] for each, size in zip(slices, shape, strict=True)]


def _layer_sharding(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stack, whose first axis is never sharded."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    return sharding


@jax.jit(static_argnames=("shape", "dtype", "sharding"))
def _zeros(shape: Shape, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@jax.jit(static_argnames=("sharding",), donate_argnames=("stack",))
def _with_layer(stack: jax.Array, piece: jax.Array, layer: int, sharding: Sharding) -> jax.Array:
    made = jax.lax.dynamic_update_index_in_dim(stack, piece, layer, 0)
    return jax.lax.with_sharding_constraint(made, sharding)


def _quantized(
    read: Callable[[Index], np.ndarray],
    shape: Shape,
    to: Quantization,
    *,
    path: str,
    codes_sharding: Sharding,
    scales_sharding: Sharding,
) -> tuple[Codes, Scales]:
    """A kernel's codes and scales, encoded on the devices from the parts that `read` returns.

    A stack is read and encoded one layer at a time, so that neither host nor devices ever hold more
    of the kernel than that.
    """
    stack = shape[:-2]
    write = _writer(to, codes_sharding, scales_sharding)
    codes, scales = shapes(to, path, shape)
    made = (
        jnp.zeros(codes.shape, codes.dtype, device=codes_sharding),
        jnp.zeros(scales.shape, scales.dtype, device=scales_sharding),
    )
    layer_sharding = _layer_sharding(codes_sharding) if stack else codes_sharding
    for layer in range(stack[0]) if stack else [None]:
        part = read if layer is None else _of_layer(read, layer)
        kernel = _placed(part, shape[-2:], layer_sharding)
        jax.block_until_ready(made)  # at most one layer is encoded while the next is read
        made = write(made, kernel, np.array([] if layer is None else [layer], np.int32))
    return made


@cache
def _writer(to: Quantization, codes_sharding: Sharding, scales_sharding: Sharding) -> Any:
    """A function that encodes one layer's kernel and writes it into the stack, in place."""

    def write(
        made: tuple[Codes, Scales], kernel: Float[Array, "i o"], layer: Int[Array, " stack"]
    ) -> tuple[Codes, Scales]:
        start = (*layer, 0, 0)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            rows = part.reshape(*(1,) * len(layer), *part.shape)
            return jax.lax.dynamic_update_slice(whole, rows, start)

        codes, scales = (put(*pair) for pair in zip(made, encode(kernel, to), strict=True))
        return codes, scales

    return jax.jit(write, donate_argnames="made", out_shardings=(codes_sharding, scales_sharding))
