"""CLIP's text encoders: token ids in, embeddings of every token and of the whole prompt out.

Source: Radford et al. 2021 (arXiv:2103.00020); OpenAI's ViT-L/14 and OpenCLIP's ViT-bigG/14,
checked against transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from taca_jax.errors import UserError
from taca_jax.nn.kinds import ModelKind, register
from taca_jax.nn.layers import LayerOptions
from taca_jax.nn.stacking import Remat, make_stack, run_stack
from taca_jax.parallel.rules import EMBEDDING, IN, OUT
from taca_jax.text.layers import embedding

NORM_EPSILON = 1e-5

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP text encoder.

    max_tokens: number of position embeddings. activation: x * sigmoid(1.702 x) in OpenAI's models,
    the exact GELU in OpenCLIP's. projection_dim: width of the space shared with images; None for a
    model without the projection. end_token: the pooled embedding is at the first token with this
    id, or if None at the highest id of the prompt, which in CLIP's own vocabulary is the same.
    """

    vocab_size: int
    max_tokens: int
    dim: int
    ff_dim: int
    num_heads: int
    num_layers: int
    activation: Activation
    projection_dim: int | None
    end_token: int | None

    def __post_init__(self):
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise UserError(
                f"num_heads is {self.num_heads}; it must divide the width of {self.dim}"
            )


CLIP_L = CLIPConfig(
    vocab_size=49408,
    max_tokens=77,
    dim=768,
    ff_dim=3072,
    num_heads=12,
    num_layers=12,
    activation="quick_gelu",
    projection_dim=768,
    end_token=None,
)
CLIP_BIGG = CLIPConfig(
    vocab_size=49408,
    max_tokens=77,
    dim=1280,
    ff_dim=5120,
    num_heads=20,
    num_layers=32,
    activation="gelu",
    projection_dim=1280,
    end_token=None,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CLIPOutput:
    """The outputs of a CLIP text encoder; different diffusion models use different ones.

    last: every token after the last layer and the final norm. penultimate: every token before the
    last layer, not normalised. pooled: `last` at the end token. projected: `pooled` in the space
    shared with images, or None if the model has no projection.
    """

    last: Float[Array, "b t d"]
    penultimate: Float[Array, "b t d"]
    pooled: Float[Array, "b d"]
    projected: Float[Array, "b p"] | None


def _linear(
    in_dim: int, out_dim: int, std: float, *, bias: bool = True, **options: Unpack[LayerOptions]
) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(in_dim, out_dim, use_bias=bias, kernel_init=init, **options)


def _norm(config: CLIPConfig, rngs: nnx.Rngs, param_dtype: DTypeLike) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.dim,
        epsilon=NORM_EPSILON,
        use_fast_variance=False,
        param_dtype=param_dtype,
        dtype=jnp.float32,
        rngs=rngs,
    )


class CLIPAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPConfig, **options: Unpack[LayerOptions]):
        self.num_heads = config.num_heads
        dim, std = config.dim, config.dim**-0.5
        self.q = _linear(dim, dim, std, **options)
        self.k = _linear(dim, dim, std, **options)
        self.v = _linear(dim, dim, std, **options)
        out_std = std * (2 * config.num_layers) ** -0.5
        self.o = _linear(dim, dim, out_std, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        b, t, _ = x.shape
        q, k, v = (
            project(x).reshape(b, t, self.num_heads, -1) for project in (self.q, self.k, self.v)
        )
        # Its softmax is float32 whatever the dtype of its inputs.
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        return self.o(attended.reshape(b, t, -1))


class CLIPFeedForward(nnx.Module):
    """wo(activation(wi(x)))."""

    def __init__(self, config: CLIPConfig, **options: Unpack[LayerOptions]):
        dim, ff_dim = config.dim, config.ff_dim
        self.activation: Activation = config.activation
        self.wi = _linear(dim, ff_dim, (2 * dim) ** -0.5, **options)
        out_std = (2 * dim * config.num_layers) ** -0.5
        self.wo = _linear(ff_dim, dim, out_std, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = self.wi(x)
        if self.activation == "quick_gelu":
            return self.wo(x * jax.nn.sigmoid(1.702 * x))
        return self.wo(jax.nn.gelu(x, approximate=False))


class CLIPBlock(nnx.Module):
    """Pre-norm attention and feed-forward on a float32 residual stream."""

    def __init__(self, config: CLIPConfig, **options: Unpack[LayerOptions]):
        self.dtype = options["dtype"]
        self.attn_norm = _norm(config, options["rngs"], options["param_dtype"])
        self.attn = CLIPAttention(config, **options)
        self.ff_norm = _norm(config, options["rngs"], options["param_dtype"])
        self.ff = CLIPFeedForward(config, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x + self.attn(self.attn_norm(x).astype(self.dtype))
        return x + self.ff(self.ff_norm(x).astype(self.dtype))


class CLIPTextEncoder(nnx.Module):
    """A CLIP text encoder; the parameters of `blocks` have a leading layer axis.

    Parameters are `param_dtype`; projections compute in `dtype`. Norms, softmax and the residual
    stream are always float32. Initialised as OpenAI's `model.py` does.
    """

    def __init__(
        self,
        config: CLIPConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.dtype = dtype
        self.token_embed = embedding(config.vocab_size, config.dim, 0.02, rngs, param_dtype)
        self.position_embed = embedding(config.max_tokens, config.dim, 0.01, rngs, param_dtype)
        self.blocks = make_stack(
            partial(CLIPBlock, config),
            config.num_layers,
            rngs=rngs,
            param_dtype=param_dtype,
            dtype=dtype,
        )
        self.final_norm = _norm(config, rngs, param_dtype)
        self.projection = nnx.data(None)
        if config.projection_dim is not None:
            self.projection = _linear(
                config.dim,
                config.projection_dim,
                config.dim**-0.5,
                bias=False,
                rngs=rngs,
                param_dtype=param_dtype,
                dtype=dtype,
            )

    def __call__(self, tokens: Int[Array, "b t"], *, remat: Remat = "none") -> CLIPOutput:
        """Embeddings of token ids, in `dtype`; padding is not masked.

        remat: what the backward pass recomputes. Raises UserError for more tokens than positions.
        """
        config = self.config
        count = tokens.shape[1]
        if count > config.max_tokens:
            raise UserError(
                f"{count} tokens a prompt; this CLIP has {config.max_tokens} positions: cut them"
            )
        x = self.token_embed(tokens) + self.position_embed(jnp.arange(count))
        x, before = run_stack(
            self.blocks,
            lambda block, carry: (block(carry[0]), carry[0]),
            (x, x),
            remat=remat,
            sharding=CLIP_KIND.sharding,
        )
        last = self.final_norm(x).astype(self.dtype)
        marked = tokens if config.end_token is None else tokens == config.end_token
        pooled = jnp.take_along_axis(last, jnp.argmax(marked, 1)[:, None, None], axis=1)[:, 0]
        projected = None if self.projection is None else self.projection(pooled)
        return CLIPOutput(last, before.astype(self.dtype), pooled, projected)


CLIP_KIND = register(
    ModelKind(
        "clip",
        "text_encoder",
        CLIPConfig,
        CLIPTextEncoder,
        sharding={
            r"(token|position)_embed": EMBEDDING,
            r"blocks\.(attn\.[qkv]|ff\.wi)": IN,
            r"blocks\.(attn\.o|ff\.wo)": OUT,
            r"projection": IN,
        },
    )
)
