"""BLIP answering questions about pictures: here, the first word of its answer.

A vision transformer embeds the picture, a BERT reads the question while it attends to the picture,
and another BERT writes the answer while it attends to the read question.

Source: Li et al. 2022 (arXiv:2201.12086), checked against transformers' `BlipForQuestionAnswering`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from taca_jax.errors import UserError
from taca_jax.nn.kinds import ModelKind, register
from taca_jax.nn.layers import LayerOptions
from taca_jax.nn.stacking import make_stack, run_stack
from taca_jax.parallel.rules import EMBEDDING, IN, OUT
from taca_jax.scorers.layers import INIT_STD, Attention, FeedForward, activate, layer_norm, linear
from taca_jax.scorers.vit import ViT, ViTConfig
from taca_jax.text.layers import embedding

NORM_EPSILON = 1e-12
"""Of BERT's norms."""


@dataclass(frozen=True)
class BLIPConfig:
    """Sizes of a BLIP for questions; those after `image` are of both BERTs, which are as wide.

    max_tokens: number of position embeddings. answer_token: begins every answer ([DEC]).
    question_token: begins every question ([ENC]) in place of BERT's own [CLS].
    """

    image: ViTConfig
    vocab_size: int
    max_tokens: int
    ff_dim: int
    num_heads: int
    num_layers: int
    answer_token: int
    question_token: int

    def __post_init__(self):
        if self.num_heads < 1 or self.image.dim % self.num_heads:
            raise UserError(
                f"num_heads is {self.num_heads}; it must divide the width of {self.image.dim}"
            )


BLIP_VQA = BLIPConfig(
    image=ViTConfig(
        image_size=480,
        patch_size=16,
        dim=768,
        ff_dim=3072,
        num_heads=12,
        num_layers=12,
        activation="gelu",
        norm_epsilon=1e-6,
        pre_norm=False,
    ),
    vocab_size=30524,
    max_tokens=512,
    ff_dim=3072,
    num_heads=12,
    num_layers=12,
    answer_token=30522,
    question_token=30523,
)
"""The published model, as its authors run it (`model_base_vqa_capfilt_large`)."""


class BERTBlock(nnx.Module):
    """Post-norm attention, attention to a context, and feed-forward; between them float32."""

    def __init__(self, config: BLIPConfig, **options: Unpack[LayerOptions]):
        self.dtype = options["dtype"]
        norm = {"rngs": options["rngs"], "param_dtype": options["param_dtype"]}
        dim, heads = config.image.dim, config.num_heads
        self.attn = Attention(dim, heads, **options)
        self.attn_norm = layer_norm(dim, NORM_EPSILON, **norm)
        self.cross = Attention(dim, heads, **options)
        self.cross_norm = layer_norm(dim, NORM_EPSILON, **norm)
        self.ff = FeedForward(dim, config.ff_dim, "gelu", **options)
        self.ff_norm = layer_norm(dim, NORM_EPSILON, **norm)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t"] | None,
        context: Float[Array, "b s d"],
        context_mask: Bool[Array, "b s"] | None,
    ) -> Float[Array, "b t d"]:
        x = self.attn_norm(x + self.attn(x.astype(self.dtype), mask=mask))
        x = self.cross_norm(x + self.cross(x.astype(self.dtype), context, context_mask))
        return self.ff_norm(x + self.ff(x.astype(self.dtype)))


class BERT(nnx.Module):
    """A BERT whose blocks also attend to a context."""

    def __init__(self, config: BLIPConfig, **options: Unpack[LayerOptions]):
        rngs, param_dtype = options["rngs"], options["param_dtype"]
        dim = config.image.dim
        self.dtype = options["dtype"]
        self.token_embed = embedding(config.vocab_size, dim, INIT_STD, rngs, param_dtype)
        self.position_embed = embedding(config.max_tokens, dim, INIT_STD, rngs, param_dtype)
        self.embed_norm = layer_norm(dim, NORM_EPSILON, rngs=rngs, param_dtype=param_dtype)
        self.blocks = make_stack(partial(BERTBlock, config), config.num_layers, **options)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None,
        context: Float[Array, "b s d"],
        context_mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Embeddings of token ids, in `dtype`. The masks say which tokens count; None: all."""
        x = self.token_embed(tokens) + self.position_embed(jnp.arange(tokens.shape[1]))
        x = run_stack(
            self.blocks,
            lambda block, x: block(x, mask, context, context_mask),
            self.embed_norm(x),
        )
        return x.astype(self.dtype)


class AnswerHead(nnx.Module):
    """From embeddings to logits of words, with the kernel of the answer's token embeddings."""

    def __init__(self, config: BLIPConfig, **options: Unpack[LayerOptions]):
        norm = {"rngs": options["rngs"], "param_dtype": options["param_dtype"]}
        self.dense = linear(config.image.dim, config.image.dim, **options)
        self.norm = layer_norm(config.image.dim, NORM_EPSILON, **norm)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, options["param_dtype"]))

    def __call__(self, x: Float[Array, "b d"], words: nnx.Embed) -> Float[Array, "b v"]:
        x = self.norm(activate(self.dense(x), "gelu"))
        kernel = words.embedding[...].astype(jnp.float32)
        return x @ kernel.T + self.bias[...].astype(jnp.float32)


class BLIPVQA(nnx.Module):
    """BLIP for questions. Parameters are `param_dtype`, projections compute in `dtype`."""

    def __init__(
        self,
        config: BLIPConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        options: LayerOptions = {"rngs": rngs, "param_dtype": param_dtype, "dtype": dtype}
        self.config = config
        self.image = ViT(config.image, **options)
        self.question = BERT(config, **options)
        self.answer = BERT(config, **options)
        self.head = AnswerHead(config, **options)

    def first_word(
        self,
        image: Float[Array, "b s d"],
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
    ) -> Float[Array, "b v"]:
        """The logits of the answer's first word, float32.

        image: of `self.image`. tokens, mask: the questions, and which of their tokens count.
        """
        read = self.question(tokens, mask, image)
        start = jnp.full((tokens.shape[0], 1), self.config.answer_token, jnp.int32)
        written = self.answer(start, None, read, mask)
        return self.head(written[:, 0], self.answer.token_embed)


BLIP_KIND = register(
    ModelKind(
        "blip_vqa",
        "scorer",
        BLIPConfig,
        BLIPVQA,
        sharding={
            r"(question|answer|image)\.(token|position|class)_embed": EMBEDDING,
            r"image\.patch_embed": IN,
            r"(question|answer|image)\.blocks\.((attn|cross)\.[qkv]|ff\.wi)": IN,
            r"(question|answer|image)\.blocks\.((attn|cross)\.o|ff\.wo)": OUT,
            r"head\.dense|head": IN,
        },
    )
)
