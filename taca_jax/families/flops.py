"""FLOPs of a transformer, counted from its config."""

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

    A multiply-add counts as two. Only the matrix products of linear layers and of attention are
    counted; elementwise operations are below 1 % at the widths of the released models.
    """
    family = family_of(config)
    linear = sum(
        2 * math.prod(layer.kernel.shape) * family.layer_tokens(path, image, text)
        for path, layer in linears(abstract_model(config, dtype=jnp.float32))
    )
    return linear + 4 * config.hidden * family.attention_pairs(config, image, text)
