"""Low-rank adapters on a model's linear layers: kernel + alpha / rank * A B.

The factors are `LoRAParam`s of the layers themselves (`nn.layers.Linear`), so that one compiled
model runs with and without them: the traced `lora_scale` argument is their strength, which is
nonzero exactly while TACA is on. The base's own parameters never change.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.nn.layers import Linear, LoRAParam


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get factors, and their size.

    rank: of the factors.
    alpha: the factors' product is multiplied by alpha / rank.
    targets: regular expressions; a layer whose whole dotted path matches one gets factors. None
      selects the attention's projections (`LoRANames.targets` of the model's family).
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be 1 or more")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha is {self.alpha}; it must be positive and finite")


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer with its dotted path; a stack of layers counts once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Linear):
            yield ".".join(str(p) for p in path), node


def attach(layer: Linear, lora_a: jax.Array, lora_b: jax.Array, alpha_over_rank: float) -> None:
    """Attaches factors `[.., in, r]` and `[.., r, out]` to one layer (or stack of layers).

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
    unused = set(targets)
    adapted = []
    for path, layer in linears(model):
        matching = {target for target in targets if re.fullmatch(target, path)}
        unused -= matching
        if not matching:
            continue
        *stack, inputs, outputs = layer.kernel[...].shape
        bound = inputs**-0.5
        a = jax.random.uniform(rngs.params(), (*stack, inputs, config.rank), dtype, -bound, bound)
        b = jnp.zeros((*stack, config.rank, outputs), dtype)
        attach(layer, a, b, config.alpha / config.rank)
        adapted.append(path)
    if unused:
        raise UserError(f"lora.targets match no layer of this model: {', '.join(sorted(unused))}")
    return adapted


def remove_lora(model: nnx.Module) -> None:
    """Removes all factors."""
    for _, layer in linears(model):
        layer.lora_a = layer.lora_b = None
        layer.lora_alpha_over_rank = 1.0
