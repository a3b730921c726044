"""Vision transformers: pixels in, an embedding of each patch and of the whole picture out.

Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), as CLIP (arXiv:2103.00020) and BLIP
(arXiv:2201.12086) have it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taca_jax.errors import UserError
from taca_jax.nn.layers import LayerOptions
from taca_jax.nn.stacking import make_stack, run_stack
from taca_jax.scorers.layers import (
    INIT_STD,
    Activation,
    Attention,
    FeedForward,
    layer_norm,
)
from taca_jax.text.layers import embedding


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    image_size, patch_size: pixels per side. norm_epsilon: of all its norms. pre_norm: a norm before
    the first block, and a patch embedding without a bias, as in CLIP.
    """

    image_size: int
    patch_size: int
    dim: int
    ff_dim: int
    num_heads: int
    num_layers: int
    activation: Activation
    norm_epsilon: float
    pre_norm: bool

    def __post_init__(self):
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise UserError(
                f"num_heads is {self.num_heads}; it must divide the width of {self.dim}"
            )
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                f"patch_size is {self.patch_size}; it must divide the side of {self.image_size}"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class ViTBlock(nnx.Module):
    """Pre-norm attention and feed-forward on a float32 residual stream."""

    def __init__(self, config: ViTConfig, **options: Unpack[LayerOptions]):
        self.dtype = options["dtype"]
        norm = {"rngs": options["rngs"], "param_dtype": options["param_dtype"]}
        self.attn_norm = layer_norm(config.dim, config.norm_epsilon, **norm)
        self.attn = Attention(config.dim, config.num_heads, **options)
        self.ff_norm = layer_norm(config.dim, config.norm_epsilon, **norm)
        self.ff = FeedForward(config.dim, config.ff_dim, config.activation, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x + self.attn(self.attn_norm(x).astype(self.dtype))
        return x + self.ff(self.ff_norm(x).astype(self.dtype))


class ViT(nnx.Module):
    """A vision transformer; the parameters of `blocks` have a leading layer axis.

    Parameters are `param_dtype`; projections compute in `dtype`. Norms, softmax and the residual
    stream are always float32.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        side = (config.patch_size, config.patch_size)
        self.config = config
        self.dtype = dtype
        self.patch_embed = nnx.Conv(
            3,
            config.dim,
            side,
            strides=side,
            padding="VALID",
            use_bias=not config.pre_norm,
            kernel_init=nnx.initializers.normal(INIT_STD),
            param_dtype=param_dtype,
            dtype=dtype,
            rngs=rngs,
        )
        self.class_embed = embedding(1, config.dim, INIT_STD, rngs, param_dtype)
        self.position_embed = embedding(1 + config.patches, config.dim, INIT_STD, rngs, param_dtype)
        self.pre_norm = nnx.data(None)
        if config.pre_norm:
            self.pre_norm = self._norm(rngs, param_dtype)
        self.blocks = make_stack(
            partial(ViTBlock, config),
            config.num_layers,
            rngs=rngs,
            param_dtype=param_dtype,
            dtype=dtype,
        )
        self.final_norm = self._norm(rngs, param_dtype)

    def _norm(self, rngs: nnx.Rngs, param_dtype: DTypeLike) -> nnx.LayerNorm:
        config = self.config
        return layer_norm(config.dim, config.norm_epsilon, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        """Embeddings in `dtype`, first that of the whole picture, then of each patch by rows.

        pixels: normalised as the model expects, `image_size` a side.
        """
        patches = self.patch_embed(pixels).astype(jnp.float32)
        b, *_, d = patches.shape
        whole = jnp.broadcast_to(self.class_embed(jnp.zeros((b, 1), jnp.int32)), (b, 1, d))
        x = jnp.concatenate([whole, patches.reshape(b, -1, d)], axis=1)
        x = x + self.position_embed(jnp.arange(x.shape[1]))
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x = run_stack(self.blocks, lambda block, x: block(x), x)
        return self.final_norm(x).astype(self.dtype)
