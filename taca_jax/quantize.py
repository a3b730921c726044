"""A frozen base in 8 or 4 bits: which kernels are quantised, and how their codes are found.

All linear layers of a model's blocks are, modulations among them, which are a quarter of FLUX.1's
parameters: together 99 % of it. What stands outside of the blocks (embeddings, the output head),
biases, norms and LoRA factors stay as they are. A quantised layer keeps its codes where its kernel
was, in the kernel's shape, and scales beside them; `models.low_bit` computes with them, one block
of the scan at a time.

This is our own, and small, because qwix (0.1.8, tried) finds parameters by intercepting operations
while the model is called, and replaces them in the layers there. Our layers exist within a scan
only, merged from a slice of the stacked parameters, where flax rightly forbids that; and what is
loaded would have to be there in full before it is quantised.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from taca_jax.errors import UserError
from taca_jax.lora import linears
from taca_jax.models.layers import Linear, Quantized
from taca_jax.models.low_bit import INT8_MAX, NF4_LEVELS, Codes, Quantization, Scales
from taca_jax.streams import of_layer, placed

LAYERS: Mapping[str, str] = {
    "flux": r"(double|single)_blocks\..*",
    "sd3": r"(dual_blocks|joint_blocks|last_block)\..*",
    "t5": r"blocks\..*",
}
"""kind of model -> its layers whose kernels are quantised, a regular expression of their paths."""

NF4_BLOCK = 64
"""Weights that share a scale, as in QLoRA: consecutive inputs of an output. So many divide the
inputs of every published model's layers; elsewhere it is the largest power of 2 that does."""
NF4_SMALLEST_BLOCK = 16

_CODES = {"int8": jnp.int8, "nf4": jnp.uint4}
_SCALES = {"int8": jnp.float32, "nf4": jnp.bfloat16}

Read = Callable[[tuple[int, ...]], np.ndarray]
"""Which layer of a stack, or () -> its matrix."""


def quantized_layers(model: nnx.Module, kind: str) -> Iterator[tuple[str, Linear]]:
    """The layers of a model that are quantised, with their dotted paths.

    Raises UserError for a kind of model of which none are.
    """
    if kind not in LAYERS:
        raise UserError(f"models of kind {kind} are not quantised; only {', '.join(LAYERS)} are")
    for path, layer in linears(model):
        if re.fullmatch(LAYERS[kind], path):
            yield path, layer


def quantize(model: nnx.Module, kind: str, to: Quantization) -> None:
    """Quantises the kernels of a model in place: arrays, or the shapes of an abstract model.

    Raises UserError for a kind of model that is not quantised, and for layers whose inputs no
    block of nf4 divides.
    """
    if to == "none":
        return
    for path, layer in quantized_layers(model, kind):
        kernel = layer.kernel.get_value()
        codes, scales = shapes(to, path, kernel.shape)
        if not isinstance(kernel, jax.ShapeDtypeStruct):
            codes, scales = _encode(kernel, to)
        layer.kernel, layer.kernel_scale = Quantized(codes), Quantized(scales)


def quantized_parts(model: nnx.State) -> dict[str, str]:
    """What the kernels of each part of a model are in, by the part's name; not of those that are
    in none."""
    names = {jnp.dtype(dtype): name for name, dtype in _CODES.items()}
    return {
        str(path[0]): names[param.dtype]
        for path, param in nnx.to_flat_state(model)
        if isinstance(param, Quantized) and path[-1] == "kernel"
    }


def shapes(
    to: Quantization, path: str, kernel: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What the codes and the scales of a kernel of this shape are.

    Raises UserError where no block of nf4 divides its inputs.
    """
    *layers, inputs, outputs = kernel
    blocks = 1
    if to == "nf4":
        block = math.gcd(inputs, NF4_BLOCK)
        if block < NF4_SMALLEST_BLOCK:
            raise UserError(
                f"{path} has {inputs} inputs; nf4 takes {NF4_SMALLEST_BLOCK} to {NF4_BLOCK} "
                "together, which must divide them: quantise to int8"
            )
        blocks = inputs // block
    return (
        jax.ShapeDtypeStruct(kernel, _CODES[to]),
        jax.ShapeDtypeStruct((*layers, blocks, outputs), _SCALES[to]),
    )


def encode(kernel: Float[Array, "*layers i o"], to: Quantization) -> tuple[Codes, Scales]:
    """The nearest codes, with scales that take the largest weight of each block to the end."""
    *layers, inputs, outputs = kernel.shape
    _, like = shapes(to, "a kernel", kernel.shape)
    blocks = like.shape[-2]
    by_block = kernel.astype(jnp.float32).reshape(*layers, blocks, inputs // blocks, outputs)
    largest = jnp.abs(by_block).max(-2)
    scales = (largest / INT8_MAX if to == "int8" else largest).astype(like.dtype)
    # As it will be multiplied with: rounded. A block of zeros has a scale of zero.
    divisor = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None, :]
    ratio = by_block / divisor
    if to == "int8":
        codes = jnp.clip(jnp.round(ratio), -INT8_MAX, INT8_MAX)
    else:
        middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4_LEVELS)]
        codes = sum((ratio > middle).astype(jnp.int32) for middle in middles)
    return jnp.asarray(codes).reshape(kernel.shape).astype(_CODES[to]), scales


_encode = jax.jit(encode, static_argnames="to")


def load_quantized(
    shape: tuple[int, ...],
    to: Quantization,
    *,
    codes_at: Sharding,
    scales_at: Sharding,
    path: str,
    read: Read,
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
    at = of_layer(codes_at) if stack else codes_at
    for layer in [(i,) for i in range(stack[0])] if stack else [()]:
        kernel = placed(read(layer), at)
        jax.block_until_ready(made)  # one layer is read while the one before is encoded, no more
        made = write(made, kernel, np.array(layer, np.int32))
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
