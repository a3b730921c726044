"""A frozen base in 8 or 4 bits: which kernels are quantised, and how they are encoded.

All linear layers of a model's blocks are quantised, including the modulations, which are a quarter
of FLUX.1's parameters: together 99 % of them. Layers outside the blocks (embeddings, the output
head), biases, norms and LoRA factors are not. A quantised layer has its codes in place of its
kernel, in the kernel's shape, and scales beside them; `nn.low_bit` computes with them, one block of
the scan at a time.

This does not use qwix (0.1.8 was tried): qwix finds parameters by intercepting operations while the
model is called, and replaces them in the layers there. Our layers exist only within a scan, merged
from a slice of the stacked parameters, where flax rightly forbids that; and a model would have to
be loaded in full before it could be quantised.
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
"""Consecutive inputs of an output that share a scale, as in QLoRA. It divides the inputs of every
layer of the published models; other layers use the largest power of 2 that divides theirs."""
NF4_SMALLEST_BLOCK = 16

_CODES = {"int8": jnp.int8, "nf4": jnp.uint4}
_SCALES = {"int8": jnp.float32, "nf4": jnp.bfloat16}


def quantized_layers(model: nnx.Module, kind: ModelKind) -> Iterator[tuple[str, Linear]]:
    """The layers of a model that can be quantised, with their dotted paths.

    Raises UserError for a kind of model that has none.
    """
    if kind.quantized is None:
        known = ", ".join(name for name, each in known_kinds().items() if each.quantized)
        raise UserError(f"models of kind {kind.name} are not quantised; only {known} are")
    for path, layer in linears(model):
        if re.fullmatch(kind.quantized, path):
            yield path, layer


def quantize(model: nnx.Module, kind: ModelKind, to: Quantization) -> None:
    """Quantises the kernels of a model in place: arrays, or the shapes of an abstract model.

    Raises UserError for a kind of model that cannot be quantised, and for layers whose number of
    inputs no nf4 block size divides.
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
    """The number format of each quantised part (top-level attribute) of a model, by its name."""
    names = {jnp.dtype(dtype): name for name, dtype in _CODES.items()}
    return {
        str(path[0]): names[param.dtype]
        for path, param in nnx.to_flat_state(model)
        if isinstance(param, Quantized) and path[-1] == "kernel"
    }


def shapes(
    to: Quantization, path: str, kernel: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the codes and the scales of a kernel of this shape.

    Raises UserError if no nf4 block size divides its inputs.
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
    """The nearest codes, and scales that map the largest weight of a block to the largest code."""
    *layers, inputs, outputs = kernel.shape
    _, like = shapes(to, "a kernel", kernel.shape)
    blocks = like.shape[-2]
    by_block = kernel.astype(jnp.float32).reshape(*layers, blocks, inputs // blocks, outputs)
    largest = jnp.abs(by_block).max(-2)
    scales = (largest / INT8_MAX if to == "int8" else largest).astype(like.dtype)
    # Divide by the rounded scale, which is what decoding multiplies by; it is zero for zero blocks.
    divisor = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None, :]
    ratio = by_block / divisor
    if to == "int8":
        codes = jnp.clip(jnp.round(ratio), -INT8_MAX, INT8_MAX)
    else:
        middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4_LEVELS)]
        codes = sum((ratio > middle).astype(jnp.int32) for middle in middles)
    return jnp.asarray(codes).reshape(kernel.shape).astype(_CODES[to]), scales


_encode = jax.jit(encode, static_argnames="to")
