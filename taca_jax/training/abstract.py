"""Models of shapes, each parameter with its place on a mesh: to plan with, and to count bytes."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from taca_jax.nn.kinds import abstract_model, kind_of
from taca_jax.nn.layers import LoRAParam, Quantized
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.nn.quantization import quantize
from taca_jax.parallel.rules import parameter_sharding
from taca_jax.weights.loading import LoadOptions


def abstract_on_mesh(
    config: Any,
    options: LoadOptions,
    *,
    lora: LoRAConfig | None = None,
    targets: tuple[str, ...] = (),
) -> Any:
    """A model of shapes, each with its place on the mesh of `options`.

    Parameters are in options.param_dtype (None: options.dtype), unless they are quantised, or LoRA
    factors, which are float32.
    """
    model = abstract_model(
        config, dtype=options.dtype, remat=options.remat, attention=options.attention
    )
    kind = kind_of(config)
    quantize(model, kind, options.quantize)
    graph, state = nnx.split(model)
    if lora is not None:
        with_factors = partial(_with_factors, graph, state, lora, targets)
        graph, state = nnx.split(nnx.eval_shape(with_factors))
    for path, param in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        wide = jnp.float32 if isinstance(param, LoRAParam) else options.param_dtype or options.dtype
        if isinstance(param, Quantized):
            wide = param.get_value().dtype
        sharding = parameter_sharding(kind.sharding, name, param.shape, options.mesh)
        param.set_value(jax.ShapeDtypeStruct(param.shape, jnp.dtype(wide), sharding=sharding))
    return nnx.merge(graph, state)


def _with_factors(
    graph: nnx.GraphDef, state: nnx.State, lora: LoRAConfig, targets: tuple[str, ...]
) -> nnx.Module:
    filled = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    model = nnx.merge(graph, filled)
    add_lora(model, lora, targets, rngs=nnx.Rngs(0))
    return model


def local_bytes(arrays: Any) -> int:
    """Bytes that one chip holds of a tree of arrays, or of the shapes of some."""
    return sum(map(_local_bytes, jax.tree.leaves(arrays)))


def _local_bytes(array: Any) -> int:
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    # A TPU keeps 4-bit numbers two to a byte; on the host each takes a whole one.
    bits = 4 if array.dtype == jnp.uint4 else 8 * array.dtype.itemsize
    return math.prod(shape) * bits // 8
