"""CLIP as a score: the cosine of a picture's and a text's embedding.

Source: Hessel et al. 2021 (CLIPScore, arXiv:2104.08718) with the ViT-B/32 of Radford et al. 2021
(arXiv:2103.00020), checked against transformers' `CLIPModel`.
"""

from dataclasses import dataclass
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from taca_jax.errors import UserError
from taca_jax.nn.kinds import ModelKind, register
from taca_jax.nn.layers import LayerOptions
from taca_jax.parallel.rules import EMBEDDING, IN, OUT
from taca_jax.scorers.layers import linear
from taca_jax.scorers.vit import ViT, ViTConfig
from taca_jax.text.clip import CLIPConfig, CLIPTextEncoder


@dataclass(frozen=True)
class CLIPScoreConfig:
    """Sizes of a CLIP with both towers, which share a space of `text.projection_dim` channels."""

    text: CLIPConfig
    image: ViTConfig

    def __post_init__(self):
        if self.text.projection_dim is None:
            raise UserError("text.projection_dim is none; a score compares projections")


CLIP_VIT_B_32 = CLIPScoreConfig(
    text=CLIPConfig(
        vocab_size=49408,
        max_tokens=77,
        dim=512,
        ff_dim=2048,
        num_heads=8,
        num_layers=12,
        activation="quick_gelu",
        projection_dim=512,
        end_token=None,
    ),
    image=ViTConfig(
        image_size=224,
        patch_size=32,
        dim=768,
        ff_dim=3072,
        num_heads=12,
        num_layers=12,
        activation="quick_gelu",
        norm_epsilon=1e-5,
        pre_norm=True,
    ),
)


class CLIPScore(nnx.Module):
    """Both towers of CLIP. Parameters are `param_dtype`, projections compute in `dtype`."""

    def __init__(
        self,
        config: CLIPScoreConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
    ):
        options: LayerOptions = {"rngs": rngs, "param_dtype": param_dtype, "dtype": dtype}
        self.config = config
        self.text = CLIPTextEncoder(config.text, **options)
        self.image = ViT(config.image, **options)
        self.image_projection = _projection(config, **options)

    def __call__(
        self, pixels: Float[Array, "b h w 3"], tokens: Int[Array, "b t"]
    ) -> Float[Array, " b"]:
        """The cosine of each picture with its text, float32."""
        image = self.image_projection(self.image(pixels)[:, 0])
        text = self.text(tokens).projected
        assert text is not None  # CLIPScoreConfig has checked it
        return jnp.sum(_unit(image) * _unit(text), axis=-1)


def _projection(config: CLIPScoreConfig, **options: Unpack[LayerOptions]) -> nnx.Linear:
    assert config.text.projection_dim is not None
    return linear(config.image.dim, config.text.projection_dim, bias=False, **options)


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


CLIP_SCORE_KIND = register(
    ModelKind(
        "clip_score",
        "scorer",
        CLIPScoreConfig,
        CLIPScore,
        sharding={
            r"(text|image)\.(token|position|class)_embed": EMBEDDING,
            r"image\.patch_embed": IN,
            r"(text|image)\.blocks\.(attn\.[qkv]|ff\.wi)": IN,
            r"(text|image)\.blocks\.(attn\.o|ff\.wo)": OUT,
            r"text\.projection|image_projection": IN,
        },
    )
)
