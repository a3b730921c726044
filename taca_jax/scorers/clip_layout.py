"""A whole CLIP, with both towers, as transformers stores it."""

from dataclasses import replace

from taca_jax.formats.key_table import TRANSPOSE, Rule, Table, linear, norm
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import Tensors
from taca_jax.scorers.clip import CLIPScoreConfig
from taca_jax.scorers.vit_layout import (
    ADD_AXIS,
    TRANSFORMERS_LAYER,
    norms_and_feed_forward,
    part_of,
    patch_embedding,
    vit_config,
)
from taca_jax.text import clip_layout as text_layout

MODEL_TYPE = "clip"
"""In transformers' config.json."""

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}

TABLE = Table(
    "a CLIP with both towers in transformers' layout",
    (
        *(replace(rule, ours=f"text.{rule.ours}") for rule in text_layout.TABLE.rules),
        patch_embedding("vision_model.embeddings.patch_embedding"),
        Rule("vision_model.embeddings.class_embedding", "image.class_embed.embedding", ADD_AXIS),
        Rule("vision_model.embeddings.position_embedding.weight", "image.position_embed.embedding"),
        *norm("vision_model.pre_layrnorm", "image.pre_norm"),  # spelt so there
        *(
            rule
            for ours, theirs in _ATTENTION.items()
            for rule in linear(
                f"{TRANSFORMERS_LAYER}.self_attn.{theirs}", f"image.blocks.attn.{ours}"
            )
        ),
        *norms_and_feed_forward(
            TRANSFORMERS_LAYER, ("layer_norm1", "layer_norm2"), "vision_model.post_layernorm"
        ),
        Rule("visual_projection.weight", "image_projection.kernel", TRANSPOSE),
    ),
    ignored=(
        *text_layout.TABLE.ignored,
        r"vision_model\.embeddings\.position_ids",  # 0, 1, 2, ...
    ),
)

# transformers' own, which are those of ViT-B/32.
_TEXT_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
}
_IMAGE_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def config_of(settings: Settings, tensors: Tensors) -> CLIPScoreConfig:
    """The config that transformers' config.json describes. Raises UserError for other models."""
    settings.expect("model_type", MODEL_TYPE)
    text = part_of(settings, "text_config", _TEXT_DEFAULTS)
    image = part_of(settings, "vision_config", _IMAGE_DEFAULTS)
    return CLIPScoreConfig(
        text=text_layout.config_of(text, tensors), image=vit_config(image, pre_norm=True)
    )
