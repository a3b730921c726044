"""Abstract models, to plan with and to count bytes: their parameters are ShapeDtypeStructs with
shardings."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from taca_jax.nn.kinds import abstract_model, kind_of
from taca_jax.nn.layers import LoRAParam, Quantized
from taca_jax.nn.quantization import quantize
from taca_jax.parallel.rules import parameter_sharding
from taca_jax.weights.loading import LoadOptions


def abstract_on_mesh(
    config: Any, options: LoadOptions, adapt: Callable[[nnx.Module], None] | None = None
) -> Any:
    """The model that `options` would load, with a ShapeDtypeStruct in place of each parameter.

    `adapt` changes the model afterwards, as by adding LoRA factors. Parameters are in
    options.param_dtype (None: options.dtype), except quantised kernels, and LoRA factors, which are
    float32.
    """
    model = abstract_model(
        config, dtype=options.dtype, remat=options.remat, attention=options.attention
    )
    kind = kind_of(config)
    quantize(model, kind, options.quantize)
    graph, state = nnx.split(model)
    if adapt is not None:
        graph, state = nnx.split(nnx.eval_shape(partial(_adapted, graph, state, adapt)))
    for path, param in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        wide = jnp.float32 if isinstance(param, LoRAParam) else options.param_dtype or options.dtype
        if isinstance(param, Quantized):
            wide = param.get_value().dtype
        sharding = parameter_sharding(kind.sharding, name, param.shape, options.mesh)
        param.set_value(jax.ShapeDtypeStruct(param.shape, jnp.dtype(wide), sharding=sharding))
    return nnx.merge(graph, state)


def _adapted(
    graph: nnx.GraphDef, state: nnx.State, adapt: Callable[[nnx.Module], None]
) -> nnx.Module:
    model = nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state))
    adapt(model)
    return model


def local_bytes(arrays: Any) -> int:
    """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs."""
    return sum(map(_local_bytes, jax.tree.leaves(arrays)))


def _local_bytes(array: Any) -> int:
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    # A TPU packs two 4-bit numbers into a byte; on the host each takes a whole byte.
    bits = 4 if array.dtype == jnp.uint4 else 8 * array.dtype.itemsize
    return math.prod(shape) * bits // 8
