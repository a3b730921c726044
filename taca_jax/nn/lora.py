"""Low-rank adapters on a model's linear layers: kernel + alpha / rank * A B.

The factors are `LoRAParam`s of the layers themselves (`nn.layers.Linear`), so that one compiled
model runs with and without them: the traced `lora_scale` argument is their strength, for LoRAs that
act with TACA nonzero exactly while TACA is on. The base's own parameters never change.

A model may have several LoRAs: their factors stand side by side along the rank, each part with a
strength of its own, so that x A B is the sum of all of them in two products.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.nn.layers import Linear, LoRAParam
from taca_jax.taca import Gate


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get factors, and their size.

    rank: of the factors.
    alpha: the factors' product is multiplied by alpha / rank.
    targets: regular expressions; a layer whose whole dotted path matches one gets factors. None
      selects the attention's projections (`LoRANames.targets` of the model's family).
    init: a LoRA file to start from, of this rank or a smaller one; none starts anew.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    init: str | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be 1 or more")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha is {self.alpha}; it must be positive and finite")


@dataclass(frozen=True)
class AttachedLoRA:
    """How one of a model's LoRAs acts: what it is called, how strongly it acts, and when."""

    name: str
    strength: float
    gate: Gate


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer with its dotted path; a stack of layers counts once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Linear):
            yield ".".join(str(p) for p in path), node


def attach(layer: Linear, lora_a: jax.Array, lora_b: jax.Array, alpha_over_rank: float) -> None:
    """Attaches factors `[.., in, r]` and `[.., r, out]` to one layer (or stack of layers), in place
    of any that it has.

    Raises ValueError if they do not fit the layer's kernel.
    """
    kernel = layer.kernel.shape  # of abstract models too
    rank = lora_a.shape[-1]
    expected = ((*kernel[:-1], rank), (*kernel[:-2], rank, kernel[-1]))
    if (lora_a.shape, lora_b.shape) != expected:
        raise ValueError(
            f"LoRA factors {lora_a.shape} and {lora_b.shape} do not fit a kernel {kernel}; "
            f"expected {expected[0]} and {expected[1]}"
        )
    layer.lora_a = LoRAParam(lora_a)
    layer.lora_b = LoRAParam(lora_b)
    layer.lora_alpha_over_rank = alpha_over_rank
    layer.lora_ranks = (rank,)


def count_loras(model: nnx.Module) -> int:
    """How many LoRAs are attached to a model."""
    return max((len(layer.lora_ranks) for _, layer in linears(model)), default=0)


def append_lora(model: nnx.Module, factors: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
    """Attaches one more LoRA, after those that the model has: by path `[.., in, r]` and
    `[.., r, out]`, which fit the layers' kernels."""
    before = count_loras(model)
    for path, layer in linears(model):
        if layer.lora_a is None or layer.lora_b is None:
            if path in factors:
                attach(layer, *factors[path], 1.0)
                layer.lora_ranks = (*(0,) * before, *layer.lora_ranks)
            continue
        ranks = (*layer.lora_ranks, 0)
        if path in factors:
            a, b = factors[path]
            ranks = (*layer.lora_ranks, a.shape[-1])
            old = layer.lora_b.get_value() * layer.lora_alpha_over_rank
            a = jnp.concatenate([layer.lora_a.get_value(), a], axis=-1)
            attach(layer, a, jnp.concatenate([old, b], axis=-2), 1.0)
        layer.lora_ranks = ranks


def drop_lora(model: nnx.Module, index: int) -> None:
    """Removes the LoRA that was attached as number `index`, counted from 0; the others stay."""
    for _, layer in linears(model):
        if layer.lora_a is None or layer.lora_b is None:
            continue
        ranks = [*layer.lora_ranks]
        start = sum(ranks[:index])
        dropped = np.arange(start, start + ranks.pop(index))
        if not any(ranks):
            _remove(layer)
            continue
        if len(dropped):
            a = jnp.delete(layer.lora_a.get_value(), dropped, axis=-1)
            b = jnp.delete(layer.lora_b.get_value(), dropped, axis=-2)
            attach(layer, a, b, layer.lora_alpha_over_rank)
        layer.lora_ranks = tuple(ranks)


def add_lora(
    model: nnx.Module,
    config: LoRAConfig,
    targets: Sequence[str],
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
) -> list[str]:
    """Attaches new factors (A uniform as in PyTorch's Linear, B zero); returns the layers' paths.

    `targets` are those of the config, or the family's if the config has none. With B = 0 the
    model's outputs are unchanged. Raises UserError for a target that matches no layer.
    """
    adapted = adapted_paths([path for path, _ in linears(model)], targets)
    for path, layer in linears(model):
        if path not in adapted:
            continue
        *stack, inputs, outputs = layer.kernel[...].shape
        bound = inputs**-0.5
        a = jax.random.uniform(rngs.params(), (*stack, inputs, config.rank), dtype, -bound, bound)
        b = jnp.zeros((*stack, config.rank, outputs), dtype)
        attach(layer, a, b, config.alpha / config.rank)
    return adapted


def adapted_paths(layers: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Those of the paths of layers that a target matches.

    Raises UserError for a target that matches none, or is no regular expression.
    """
    unused, adapted = set(targets), []
    for path in layers:
        try:
            matching = {target for target in targets if re.fullmatch(target, path)}
        except re.error as error:
            raise UserError(
                f"lora.targets has {error.pattern}, which is no regular expression: {error}"
            ) from None
        unused -= matching
        if matching:
            adapted.append(path)
    if unused:
        raise UserError(f"lora.targets match no layer of this model: {', '.join(sorted(unused))}")
    return adapted


def remove_lora(model: nnx.Module) -> None:
    """Removes all factors."""
    for _, layer in linears(model):
        _remove(layer)


def _remove(layer: Linear) -> None:
    layer.lora_a = layer.lora_b = None
    layer.lora_alpha_over_rank = 1.0
    layer.lora_ranks = ()
