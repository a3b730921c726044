"""Kinds of models: what is needed to store, shard and quantise a model of each kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from taca_jax.attention import Implementation
from taca_jax.config.fields import Variants
from taca_jax.nn.layers import Fixed, LoRAParam
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.rules import ShardingTable


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Variants):
    """The fields that every transformer's config has; each family adds its own.

    patch_size: latent pixels per token side.
    latent_channels: of the autoencoder.
    num_heads, head_dim: of attention.
    mlp_ratio: width of the MLPs' hidden layer, relative to the blocks'.
    txt_dim, pooled_dim: width of the token and of the pooled text embeddings; 0 if there is none.
    """

    patch_size: int
    latent_channels: int
    num_heads: int
    head_dim: int
    mlp_ratio: float
    txt_dim: int
    pooled_dim: int

    @property
    def hidden(self) -> int:
        """Channels of a token between the blocks."""
        return self.num_heads * self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Channels of the MLPs' hidden layer."""
        return int(self.hidden * self.mlp_ratio)

    @classmethod
    def variants(cls) -> Mapping[str, type]:
        return {kind.name: kind.config for kind in _KINDS.values() if kind.role == "transformer"}


Role = Literal["transformer", "text_encoder", "autoencoder", "scorer"]


@dataclass(frozen=True, eq=False)
class ModelKind:
    """One kind of model: a transformer, a text encoder, an autoencoder, a scorer of pictures.

    name: the `kind` in its folder's config.json.
    role: the part that it plays in a pipeline; scorers are in none.
    config: the dataclass of its sizes.
    module: the NNX module, created as `module(config, rngs=..., dtype=..., param_dtype=...)`.
    sharding: the sharding table of its parameters (`parallel.rules`).
    quantized: regular expression of the layers whose kernels can be quantised to 8 or 4 bits; None
      if there are none.
    """

    name: str
    role: Role
    config: type
    module: type
    sharding: ShardingTable
    quantized: str | None = None


_KINDS: dict[str, ModelKind] = {}


def register(kind: ModelKind) -> ModelKind:
    """Registers a kind and returns it. Raises ValueError if another kind has its name."""
    if _KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a kind of model called {kind.name} already")
    return kind


def known_kinds() -> Mapping[str, ModelKind]:
    """Every kind whose module has been imported, by name, sorted."""
    return dict(sorted(_KINDS.items()))


def kind_of(config: Any) -> ModelKind:
    """The kind of model that this config describes."""
    return next(kind for kind in _KINDS.values() if kind.config is type(config))


def abstract_model(
    config: Any,
    *,
    dtype: DTypeLike,
    remat: Remat = "none",
    attention: Implementation = "auto",
) -> Any:
    """The model of a config with shapes in place of arrays; `remat` and `attention` are for
    transformers."""
    module = kind_of(config).module
    # Only transformers take these; the defaults are left out for all other models.
    defaults = {"remat": (remat, "none"), "attention": (attention, "auto")}
    options = {name: value for name, (value, default) in defaults.items() if value != default}
    return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), dtype=dtype, **options))


def flat_params(model: nnx.Module) -> dict[str, Any]:
    """What is stored of a model, by dotted path: parameters and fixed tables, not LoRA factors."""
    base = nnx.state(model, nnx.All(nnx.Any(nnx.Param, Fixed), nnx.Not(nnx.OfType(LoRAParam))))
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(base)}


def filled(model: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """The abstract model with these arrays as its parameters, by dotted path."""
    graph, state = nnx.split(model)
    for path, param in nnx.to_flat_state(state):
        param.set_value(arrays[".".join(map(str, path))])
    return nnx.merge(graph, state)


@cache
def shapes_of(config: Any) -> Mapping[str, tuple[int, ...]]:
    """The parameter shapes of a config's model, by dotted path."""
    model = abstract_model(config, dtype=jnp.float32)
    return {path: param.shape for path, param in flat_params(model).items()}
