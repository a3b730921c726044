"""The encoder of T5 v1.1: tokens in, one embedding per token out.

Source: Raffel et al. 2020 (arXiv:1910.10683) and the v1.1 changes (gated GELU, no shared
embedding with the head); checked against transformers' `T5EncoderModel`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from taca_jax.nn.kinds import ModelKind, register
from taca_jax.nn.layers import LayerOptions, Linear, RMSNorm
from taca_jax.nn.stacking import Remat, make_stack, run_stack
from taca_jax.parallel.rules import EMBEDDING, IN, OUT, WHOLE
from taca_jax.text.layers import embedding

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; distances are in tokens."""

    vocab_size: int
    dim: int
    ff_dim: int
    num_heads: int
    head_dim: int
    num_layers: int
    relative_buckets: int = 32
    relative_max_distance: int = 128

    def __post_init__(self):
        # Half of the buckets are for each direction, and half of those hold one distance each.
        exact = self.relative_buckets // 4
        if exact < 1 or self.relative_max_distance <= exact:
            raise ValueError(
                f"relative_buckets={self.relative_buckets} and relative_max_distance="
                f"{self.relative_max_distance}: expected at least 4 buckets and a distance above "
                f"a quarter of them"
            )


T5_XXL = T5Config(
    vocab_size=32128, dim=4096, ff_dim=10240, num_heads=64, head_dim=64, num_layers=24
)


def relative_position_bucket(
    distance: np.ndarray, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Buckets, in 0..num_buckets - 1, of the distances (key position - query position).

    Near distances have a bucket each, far ones share buckets of logarithmically growing width, and
    all from `max_distance` on share the last. Computed at trace time in float32, as in the
    original, so that distances at a bucket's edge get the same bucket.
    """
    per_direction = num_buckets // 2
    num_exact = per_direction // 2
    size = np.abs(distance)
    ratio = np.maximum(size, 1).astype(np.float32) / np.float32(num_exact)
    scale = np.float32(math.log(max_distance / num_exact))
    far = num_exact + (np.log(ratio) / scale * (per_direction - num_exact)).astype(np.int32)
    bucket = np.where(size < num_exact, size, np.minimum(far, per_direction - 1))
    return (bucket + np.where(distance > 0, per_direction, 0)).astype(np.int32)


def _linear(in_dim: int, out_dim: int, std: float, **options: Unpack[LayerOptions]) -> Linear:
    init = nnx.initializers.normal(std)
    return Linear(in_dim, out_dim, bias=False, kernel_init=init, **options)


def _norm(config: T5Config, rngs: nnx.Rngs, param_dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(config.dim, rngs=rngs, param_dtype=param_dtype, epsilon=NORM_EPSILON)


class T5Attention(nnx.Module):
    """Self-attention with a position bias, without 1/sqrt(d), which q's initialisation contains."""

    def __init__(self, config: T5Config, **options: Unpack[LayerOptions]):
        self.num_heads = config.num_heads
        self.dtype = options["dtype"]
        dim, inner = config.dim, config.num_heads * config.head_dim
        self.q = _linear(dim, inner, (dim * config.head_dim) ** -0.5, **options)
        self.k = _linear(dim, inner, dim**-0.5, **options)
        self.v = _linear(dim, inner, dim**-0.5, **options)
        self.o = _linear(inner, dim, inner**-0.5, **options)

    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "b h t t"]
    ) -> Float[Array, "b t d"]:
        """`bias`, float32, is added to the logits; its batch axis may be 1."""
        b, t, _ = x.shape
        q, k, v = (
            project(x).reshape(b, t, self.num_heads, -1) for project in (self.q, self.k, self.v)
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(self.dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, -1))


class T5FeedForward(nnx.Module):
    """wo(gelu(wi_gate(x)) * wi_value(x)), with the tanh form of GELU."""

    def __init__(self, config: T5Config, **options: Unpack[LayerOptions]):
        dim, ff_dim = config.dim, config.ff_dim
        self.wi_gate = _linear(dim, ff_dim, dim**-0.5, **options)
        self.wi_value = _linear(dim, ff_dim, dim**-0.5, **options)
        self.wo = _linear(ff_dim, dim, ff_dim**-0.5, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.wo(jax.nn.gelu(self.wi_gate(x), approximate=True) * self.wi_value(x))


class T5Block(nnx.Module):
    """Pre-norm attention and feed-forward on a float32 residual stream."""

    def __init__(self, config: T5Config, **options: Unpack[LayerOptions]):
        self.dtype = options["dtype"]
        self.attn_norm = _norm(config, options["rngs"], options["param_dtype"])
        self.attn = T5Attention(config, **options)
        self.ff_norm = _norm(config, options["rngs"], options["param_dtype"])
        self.ff = T5FeedForward(config, **options)

    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "b h t t"]
    ) -> Float[Array, "b t d"]:
        x = x + self.attn(self.attn_norm(x).astype(self.dtype), bias)
        return x + self.ff(self.ff_norm(x).astype(self.dtype))


class T5Encoder(nnx.Module):
    """A T5 v1.1 encoder; the parameters of `blocks` have a leading layer axis.

    Parameters are `param_dtype`; projections compute in `dtype`. Norms, softmax and the residual
    stream are always float32: XXL's residual stream grows so large that bfloat16 would round away
    the updates of late layers. Initialised as in mesh-tensorflow, for training from scratch.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.dtype = dtype
        self.token_embed = embedding(config.vocab_size, config.dim, 1.0, rngs, param_dtype)
        self.relative_bias = embedding(
            config.relative_buckets, config.num_heads, config.dim**-0.5, rngs, param_dtype
        )
        self.blocks = make_stack(
            partial(T5Block, config),
            config.num_layers,
            rngs=rngs,
            param_dtype=param_dtype,
            dtype=dtype,
        )
        self.final_norm = _norm(config, rngs, param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        *,
        remat: Remat = "none",
    ) -> Float[Array, "b t d"]:
        """Embeddings of token ids, in `dtype`.

        mask: tokens where it is False are not attended to, though they have outputs; FLUX and SD3
        use no mask. remat: what the backward pass recomputes.
        """
        bias = self._position_bias(tokens.shape[1])
        if mask is not None:
            bias = bias + jnp.where(mask[:, None, None, :], 0.0, jnp.finfo(jnp.float32).min)
        x = self.token_embed(tokens)
        x = run_stack(
            self.blocks,
            lambda block, x: block(x, bias),
            x,
            remat=remat,
            sharding=T5_KIND.sharding,
        )
        return self.final_norm(x).astype(self.dtype)

    def _position_bias(self, length: int) -> Float[Array, "1 h t t"]:
        """The float32 bias for each distance (key - query), which all layers share."""
        distance = np.arange(1 - length, length)
        bucket = relative_position_bucket(
            distance, self.config.relative_buckets, self.config.relative_max_distance
        )
        by_distance = self.relative_bias(jnp.asarray(bucket))
        position = jnp.arange(length)
        index = position[None, :] - position[:, None] + length - 1
        return jnp.transpose(by_distance[index], (2, 0, 1))[None]


T5_KIND = register(
    ModelKind(
        "t5",
        "text_encoder",
        T5Config,
        T5Encoder,
        sharding={
            r"token_embed": EMBEDDING,
            r"relative_bias": (WHOLE, WHOLE),
            r"blocks\.(attn\.[qkv]|ff\.wi_(gate|value))": IN,
            r"blocks\.(attn\.o|ff\.wo)": OUT,
        },
        quantized=r"blocks\..*",
    )
)
