"""The arithmetic of a transformer, counted from its shape."""

import functools
import math
from typing import Any

import jax.numpy as jnp

from taca_jax.families.registry import family_of
from taca_jax.nn.kinds import abstract_model
from taca_jax.nn.lora import linears


@functools.cache
def forward_flops(config: Any, *, image: int, text: int) -> float:
    """FLOPs of a transformer's forward pass on one sample of `image` and `text` tokens.

    A multiply-add is two. Products alone: linear layers, and queries with keys and with values;
    what is done to each element beside them is below a hundredth at the models' real widths.
    """
    family = family_of(config)
    linear = sum(
        2 * math.prod(layer.kernel.shape) * family.layer_tokens(path, image, text)
        for path, layer in linears(abstract_model(config, dtype=jnp.float32))
    )
    return linear + 4 * config.hidden * family.attention_pairs(config, image, text)
