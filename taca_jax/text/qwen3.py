"""Qwen3 as a text encoder: tokens in, hidden states of some of its layers out.

Source: the Qwen3 report (arXiv:2505.09388); checked against transformers' `Qwen3ForCausalLM`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from taca_jax.errors import UserError
from taca_jax.nn.kinds import ModelKind, register
from taca_jax.nn.layers import LayerOptions, Linear, RMSNorm
from taca_jax.nn.stacking import make_stack, run_stack
from taca_jax.parallel.rules import EMBEDDING, IN, OUT
from taca_jax.text.layers import embedding

INIT_STD = 0.02

CHAT = (
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
"""What the chat template, without thinking, puts before and after what a user says."""


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3 as a text encoder.

    num_kv_heads: heads of keys and values, each shared by as many of queries. theta: base of the
    rotary wavelengths. num_layers: the layers that are kept, of a published model those up to the
    last that is read. reads: the hidden states that are read, by the number of layers before them.

    Raises UserError for heads that keys cannot share, and for layers that there are not.
    """

    vocab_size: int
    dim: int
    ff_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    reads: tuple[int, ...]
    theta: float = 1_000_000
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise UserError(
                f"Qwen3 has {self.num_heads} heads of {self.head_dim} channels, and "
                f"{self.num_kv_heads} of keys; expected even channels, and a divisor of the heads"
            )
        if not self.reads or not 1 <= min(self.reads) <= max(self.reads) <= self.num_layers:
            raise UserError(
                f"hidden states after the layers {self.reads} are read of a Qwen3 of "
                f"{self.num_layers} layers; it is of another model"
            )

    @property
    def width(self) -> int:
        """Channels of a token's hidden states, side by side."""
        return len(self.reads) * self.dim


READS = (9, 18, 27)
"""The hidden states that FLUX.2 reads, of 4B and of 8B."""

QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    dim=2560,
    ff_dim=9728,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_layers=READS[-1],
    reads=READS,
)
QWEN3_8B = replace(QWEN3_4B, dim=4096, ff_dim=12288)


def rotate_halves(x: Float[Array, "b t h d"], theta: float) -> Float[Array, "b t h d"]:
    """Rotates channel i with channel i + d / 2, by the token's position, in float32."""
    _, length, _, dim = x.shape
    frequency = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = np.arange(length)[:, None, None] * frequency
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _linear(inputs: int, outputs: int, **options: Unpack[LayerOptions]) -> Linear:
    init = nnx.initializers.normal(INIT_STD)
    return Linear(inputs, outputs, bias=False, kernel_init=init, **options)


def _norm(features: int, config: Qwen3Config, options: LayerOptions) -> RMSNorm:
    return RMSNorm(
        features,
        rngs=options["rngs"],
        param_dtype=options["param_dtype"],
        epsilon=config.norm_epsilon,
    )


class Qwen3Attention(nnx.Module):
    """Self-attention with normalised, rotated queries and keys; softmax in float32."""

    def __init__(self, config: Qwen3Config, **options: Unpack[LayerOptions]):
        self.config = config
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q = _linear(config.dim, queries, **options)
        self.k = _linear(config.dim, keys, **options)
        self.v = _linear(config.dim, keys, **options)
        self.o = _linear(queries, config.dim, **options)
        self.q_norm = _norm(config.head_dim, config, options)
        self.k_norm = _norm(config.head_dim, config, options)

    def __call__(
        self, x: Float[Array, "b t d"], allowed: Bool[Array, "b t t"]
    ) -> Float[Array, "b t d"]:
        """`allowed[b, i, j]`: whether token i attends to token j."""
        config = self.config
        b, t, _ = x.shape
        q, k, v = (y.reshape(b, t, -1, config.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        q = rotate_halves(self.q_norm(q), config.theta)
        k = rotate_halves(self.k_norm(k), config.theta)
        q = q.reshape(b, t, config.num_kv_heads, -1, config.head_dim)
        logits = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
        logits = logits * config.head_dim**-0.5
        logits = jnp.where(allowed[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return self.o(jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(b, t, -1))


class Qwen3Block(nnx.Module):
    """Pre-norm attention and SwiGLU on a float32 residual stream."""

    def __init__(self, config: Qwen3Config, **options: Unpack[LayerOptions]):
        self.dtype = options["dtype"]
        self.attn_norm = _norm(config.dim, config, options)
        self.attn = Qwen3Attention(config, **options)
        self.mlp_norm = _norm(config.dim, config, options)
        self.gate = _linear(config.dim, config.ff_dim, **options)
        self.up = _linear(config.dim, config.ff_dim, **options)
        self.down = _linear(config.ff_dim, config.dim, **options)

    def __call__(
        self, x: Float[Array, "b t d"], allowed: Bool[Array, "b t t"]
    ) -> Float[Array, "b t d"]:
        x = x + self.attn(self.attn_norm(x).astype(self.dtype), allowed)
        y = self.mlp_norm(x).astype(self.dtype)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Qwen3Encoder(nnx.Module):
    """A Qwen3 up to the last hidden states that are read, without its head.

    Parameters are `param_dtype`; projections compute in `dtype`. Norms, softmax and the residual
    stream are always float32. The parameters of `blocks` have a leading layer axis.
    """

    def __init__(
        self,
        config: Qwen3Config,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.dtype = dtype
        self.token_embed = embedding(config.vocab_size, config.dim, INIT_STD, rngs, param_dtype)
        self.blocks = make_stack(
            partial(Qwen3Block, config),
            config.num_layers,
            rngs=rngs,
            param_dtype=param_dtype,
            dtype=dtype,
        )

    def __call__(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b t w"]:
        """The hidden states that `config.reads` names, side by side, in `dtype`.

        Tokens attend to those before them and to themselves; where `mask` is False (padding) they
        are not attended to, though they have outputs.
        """
        config, length = self.config, tokens.shape[1]
        allowed = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, :]

        def step(
            block: Qwen3Block, carry: tuple[jax.Array, ...], number: Int[Array, ""]
        ) -> tuple[jax.Array, ...]:
            x, *kept = carry
            x = block(x, allowed)
            after = zip(config.reads, kept, strict=True)
            return x, *(jnp.where(number == read, x, before) for read, before in after)

        x = self.token_embed(tokens)
        carry = (x, *(jnp.zeros_like(x) for _ in config.reads))
        numbers = jnp.arange(1, config.num_layers + 1)
        _, *kept = run_stack(self.blocks, step, carry, each=numbers)
        return jnp.concatenate(kept, axis=-1).astype(self.dtype)


QWEN3_KIND = register(
    ModelKind(
        "qwen3",
        "text_encoder",
        Qwen3Config,
        Qwen3Encoder,
        sharding={
            r"token_embed": EMBEDDING,
            r"blocks\.(attn\.[qkv]|gate|up)": IN,
            r"blocks\.(attn\.o|down)": OUT,
        },
        quantized=r"blocks\..*",
    )
)
