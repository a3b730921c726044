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
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.errors import UserError
from taca_jax.nn.kinds import ModelKind, known_kinds
from taca_jax.nn.layers import Linear, Quantized
from taca_jax.nn.lora import linears
from taca_jax.nn.low_bit import INT8_MAX, NF4_LEVELS, Codes, Quantization, Scales

NF4_BLOCK = 64
"""Weights that share a scale, as in QLoRA: consecutive inputs of an output. So many divide the
inputs of every published model's layers; elsewhere it is the largest power of 2 that does."""
NF4_SMALLEST_BLOCK = 16

_CODES = {"int8": jnp.int8, "nf4": jnp.uint4}
_SCALES = {"int8": jnp.float32, "nf4": jnp.bfloat16}


def quantized_layers(model: nnx.Module, kind: ModelKind) -> Iterator[tuple[str, Linear]]:
    """The layers of a model that are quantised, with their dotted paths.

    Raises UserError for a kind of model of which none are.
    """
    if kind.quantized is None:
        known = ", ".join(name for name, each in known_kinds().items() if each.quantized)
        raise UserError(f"models of kind {kind.name} are not quantised; only {known} are")
    for path, layer in linears(model):
        if re.fullmatch(kind.quantized, path):
            yield path, layer


def quantize(model: nnx.Module, kind: ModelKind, to: Quantization) -> None:
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
