"""FLOPs of a transformer, counted from its config."""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from taca_jax.families.registry import family_of
from taca_jax.nn.kinds import abstract_model
from taca_jax.nn.lora import linears
from taca_jax.nn.stacking import KEPT, Remat


@functools.cache
def forward_flops(config: Any, *, image: int, text: int) -> float:
    """FLOPs of a transformer's forward pass on one sample of `image` and `text` tokens.

    A multiply-add counts as two. Only the matrix products of linear layers and of attention are
    counted; elementwise operations are below 1 % at the widths of the released models.
    """
    linear = sum(flops for _, _, flops in _layers(config, image, text))
    return linear + _attention_flops(config, image, text)


@functools.cache
def further_flops(config: Any, remat: Remat, *, all_trained: bool, image: int, text: int) -> float:
    """FLOPs of a training step on one sample beyond forward pass and gradients, where gradients
    are counted as often as the forward pass.

    Attention's are five products for two: the score is computed again, and each product has two
    gradients. Blocks are recomputed as `remat` says, but for their last products, which only the
    gradients of modulations need: those are there if all parameters are trained.
    """
    attention = _attention_flops(config, image, text)
    further = 1.5 * attention
    if remat == "none":
        return further
    family = family_of(config)
    for path, is_stacked, flops in _layers(config, image, text):
        if not is_stacked or (not all_trained and re.fullmatch(family.last_products, path)):
            continue
        kept = family.kept_products(config, path)
        further += flops * (1 - sum(kept.get(name, 0.0) for name in KEPT[remat]))
    return further + (attention if remat == "full" else 0.0)


def _layers(config: Any, image: int, text: int) -> Iterator[tuple[str, bool, float]]:
    """Every linear layer: its path, whether it is in a stack of blocks, and its FLOPs."""
    tokens = family_of(config).layer_tokens
    for path, layer in linears(abstract_model(config, dtype=jnp.float32)):
        shape = layer.kernel.shape
        yield path, len(shape) == 3, 2 * math.prod(shape) * tokens(path, image, text)


def _attention_flops(config: Any, image: int, text: int) -> float:
    return 4 * config.hidden * family_of(config).attention_pairs(config, image, text)
