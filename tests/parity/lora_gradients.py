"""Gradients of LoRA factors in the form of an adapter, to be given a layout's names."""

import numpy as np
from flax import nnx

from taca_jax.formats.lora.factors import unstacked
from taca_jax.nn.lora import linears


def by_layer(gradient: nnx.State, model: nnx.Module) -> dict:
    """The gradients of `model`'s factors, layer by layer, as `tensors_of` takes factors.

    d loss / d b is for b times the strength, which must be 1.
    """
    found = {}
    for path, _ in linears(model):
        node = gradient
        for part in path.split("."):
            node = node.get(part, {})
        if "lora_a" in node:
            found |= unstacked(
                path, np.asarray(node["lora_a"].get_value()), np.asarray(node["lora_b"].get_value())
            )
    return found
