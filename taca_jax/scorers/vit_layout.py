"""What the layouts of vision transformers share."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from taca_jax.formats.key_table import CONVOLUTION, Rule, Transform, linear, norm
from taca_jax.formats.settings import Settings
from taca_jax.scorers.vit import ViTConfig

ADD_AXIS = Transform(lambda x: x[np.newaxis], lambda x: x[0])
"""Their `[d]`, our `[1, d]`."""
DROP_AXIS = Transform(lambda x: x[0], lambda x: x[np.newaxis])
"""Their `[1, t, d]`, our `[t, d]`."""

TRANSFORMERS_LAYER = "vision_model.encoder.layers.{layer}"


def patch_embedding(theirs: str) -> Rule:
    return Rule(f"{theirs}.weight", "image.patch_embed.kernel", CONVOLUTION)


def norms_and_feed_forward(layer: str, norms: tuple[str, str], final_norm: str) -> tuple[Rule, ...]:
    """The rules of the blocks, but for their attention, and of the final norm."""
    before_attention, before_feed_forward = norms
    return (
        *norm(f"{layer}.{before_attention}", "image.blocks.attn_norm"),
        *norm(f"{layer}.{before_feed_forward}", "image.blocks.ff_norm"),
        *linear(f"{layer}.mlp.fc1", "image.blocks.ff.wi"),
        *linear(f"{layer}.mlp.fc2", "image.blocks.ff.wo"),
        *norm(final_norm, "image.final_norm"),
    )


def part_of(settings: Settings, name: str, defaults: Mapping[str, Any]) -> Settings:
    """The object `name` in a config.json, completed with transformers' defaults.

    transformers leaves fields out that have its default value.
    """
    fields = settings.get(name, {})
    if not isinstance(fields, dict):
        fields = {}
    return Settings(settings.where, {**defaults, **fields})


def vit_config(settings: Settings, *, pre_norm: bool) -> ViTConfig:
    """The config that `vision_config`, completed with defaults, describes."""
    settings.expect("num_channels", 3)
    values = {
        "image_size": settings["image_size"],
        "patch_size": settings["patch_size"],
        "dim": settings["hidden_size"],
        "ff_dim": settings["intermediate_size"],
        "num_heads": settings["num_attention_heads"],
        "num_layers": settings["num_hidden_layers"],
        "activation": settings["hidden_act"],
        "norm_epsilon": settings["layer_norm_eps"],
        "pre_norm": pre_norm,
    }
    return settings.build(ViTConfig, values)
