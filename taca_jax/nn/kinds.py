"""Kinds of models: what storing, placing and quantising one needs to know of it."""

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
    """What is read of any transformer's config; each family's own has more.

    patch_size: latent pixels per token side. latent_channels: of the autoencoder.
    num_heads: of attention.
    txt_dim, pooled_dim: width of the token and of the pooled text embeddings.
    """

    patch_size: int
    latent_channels: int
    num_heads: int
    txt_dim: int
    pooled_dim: int

    @property
    def hidden(self) -> int:
        """Channels of a token between the blocks."""
        raise NotImplementedError

    @classmethod
    def variants(cls) -> Mapping[str, type]:
        return {kind.name: kind.config for kind in _KINDS.values() if kind.role == "transformer"}


Role = Literal["transformer", "text_encoder", "autoencoder"]


@dataclass(frozen=True, eq=False)
class ModelKind:
    """One kind of model: a transformer, a text encoder, an autoencoder.

    name: what its folder's config.json calls it.
    role: what it is for.
    config: the dataclass of its sizes.
    module: the NNX module, made by `module(config, rngs=..., dtype=..., param_dtype=...)`.
    sharding: where its parameters lie on a mesh (`parallel.rules`).
    quantized: regular expression of the layers whose kernels can be kept in 8 or 4 bits; None
      where none can.
    """

    name: str
    role: Role
    config: type
    module: type
    sharding: ShardingTable
    quantized: str | None = None


_KINDS: dict[str, ModelKind] = {}


def register(kind: ModelKind) -> ModelKind:
    """Makes a kind known, and returns it. Raises ValueError where another one has its name."""
    if _KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a kind of model called {kind.name} already")
    return kind


def known_kinds() -> Mapping[str, ModelKind]:
    """Every kind whose module has been imported, by name and in the order of names."""
    return dict(sorted(_KINDS.items()))


def kind_of(config: Any) -> ModelKind:
    """The kind whose models have a config of this class."""
    return next(kind for kind in _KINDS.values() if kind.config is type(config))


def abstract_model(
    config: Any,
    *,
    dtype: DTypeLike,
    remat: Remat = "none",
    attention: Implementation = "auto",
) -> Any:
    """The model of a config with shapes in place of parameters; `remat` and `attention` are for
    transformers."""
    module = kind_of(config).module
    options: dict[str, str] = {}
    if remat != "none":
        options["remat"] = remat
    if attention != "auto":
        options["attention"] = attention
    return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), dtype=dtype, **options))


def flat_params(model: nnx.Module) -> dict[str, Any]:
    """What is stored of a model, by dotted path: parameters and fixed tables, no LoRA factors."""
    base = nnx.state(model, nnx.All(nnx.Any(nnx.Param, Fixed), nnx.Not(nnx.OfType(LoRAParam))))
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(base)}


def filled(model: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """An abstract model with an array for every parameter."""
    graph, state = nnx.split(model)
    for path, param in nnx.to_flat_state(state):
        param.set_value(arrays[".".join(map(str, path))])
    return nnx.merge(graph, state)


@cache
def shapes_of(config: Any) -> Mapping[str, tuple[int, ...]]:
    """The parameters of a config's models by dotted path."""
    model = abstract_model(config, dtype=jnp.float32)
    return {path: param.shape for path, param in flat_params(model).items()}
