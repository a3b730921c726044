"""Stable Diffusion 3 transformers as diffusers stores them (`SD3Transformer2DModel`)."""

from dataclasses import replace
from typing import Any

import numpy as np

from taca_jax.errors import UserError
from taca_jax.families import diffusers_names
from taca_jax.families.sd3.model import SD3Config
from taca_jax.formats.key_table import Rule, Table, Transform, linear
from taca_jax.formats.scheduler import schedule_of as flow_schedule_of
from taca_jax.formats.settings import Settings
from taca_jax.sampling.schedule import FlowSchedule

MLP_RATIO = 4.0
"""Fixed in diffusers' code."""

SHIFT = 3.0
"""The time shift of the noise levels in every released model."""

CLASS = "SD3Transformer2DModel"
BLOCK = "transformer_blocks.{layer}"


def patch_rules(embed: str, out: str, config: SD3Config, *, positions: str) -> tuple[Rule, ...]:
    """The rules of patch embedding, output layer and position table, in both layouts of SD3.

    Their input layer is a convolution, and their output tokens hold (row, column, channel); our
    input and output tokens both hold (channel, row, column). `positions` names the position table.
    """
    patch = config.patch_size

    def to_channels_first(x: np.ndarray) -> np.ndarray:
        return x.reshape(patch * patch, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    def to_channels_last(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, patch * patch, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    convolution = Transform(
        lambda x: x.reshape(x.shape[0], -1).T,
        lambda x: x.T.reshape(x.shape[1], -1, patch, patch),
    )
    return (
        Rule(f"{embed}.weight", "img_in.kernel", convolution),
        Rule(f"{embed}.bias", "img_in.bias"),
        Rule(positions, "position_embed.embedding", Transform(lambda x: x[0], lambda x: x[None])),
        Rule(
            f"{out}.weight",
            "final_out.kernel",
            Transform(lambda x: to_channels_first(x).T, lambda x: to_channels_last(x.T)),
        ),
        Rule(f"{out}.bias", "final_out.bias", Transform(to_channels_first, to_channels_last)),
    )


def joint_block(block: str, ours: str, *, dual: bool) -> tuple[Rule, ...]:
    """The rules of a block other than the last, by its prefix in their names and in ours."""
    if not dual:
        return diffusers_names.joint_block(block, ours)
    return (
        *diffusers_names.joint_block(block, ours),
        *diffusers_names.qkv(f"{block}.attn2", f"{ours}.img_attn"),
        *linear(f"{block}.attn2.to_out.0", f"{ours}.img_attn.out"),
    )


def only(layers: range, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a stack that holds these layers of theirs."""
    return tuple(replace(rule, layers=layers) for rule in rules)


def table_of(config: SD3Config) -> Table:
    """The key table of a transformer of this config."""
    dual, last = config.num_dual_layers, config.num_layers - 1
    last_block = BLOCK.format(layer=last)
    return Table(
        "a Stable Diffusion 3 transformer in diffusers' layout",
        (
            *patch_rules("pos_embed.proj", "proj_out", config, positions="pos_embed.pos_embed"),
            *linear("context_embedder", "txt_in"),
            *diffusers_names.embedder("timestep_embedder", "time_in"),
            *diffusers_names.embedder("text_embedder", "vector_in"),
            *only(range(dual), joint_block(BLOCK, "dual_blocks", dual=True)),
            *only(range(dual, last), joint_block(BLOCK, "joint_blocks", dual=False)),
            *diffusers_names.img_stream(last_block, "last_block"),
            *diffusers_names.txt_qkv(last_block, "last_block"),
            *diffusers_names.output_modulation(f"{last_block}.norm1_context", "last_block.txt.mod"),
            *diffusers_names.output_modulation("norm_out", "final_mod"),
        ),
    )


def config_of(settings: Settings) -> SD3Config:
    """The config that diffusers' config.json describes.

    Raises UserError for another class, and for options that no Stable Diffusion 3 uses.
    """
    settings.expect("_class_name", CLASS)
    settings.expect("qk_norm", "rms_norm")
    heads = settings.integer("num_attention_heads")
    head_dim = settings.integer("attention_head_dim")
    settings.expect("caption_projection_dim", heads * head_dim)
    settings.expect("out_channels", settings["in_channels"])
    dual = settings.entries("dual_attention_layers")
    if dual != list(range(len(dual))):
        raise UserError(
            f"{settings.where} says dual_attention_layers {dual}; only the first layers without "
            "a gap are supported"
        )
    values = {
        "patch_size": settings["patch_size"],
        "latent_channels": settings["in_channels"],
        "num_heads": heads,
        "head_dim": head_dim,
        "num_layers": settings["num_layers"],
        "num_dual_layers": len(dual),
        "qk_norm": "rms" if settings.get("qk_norm", None) else "none",
        "position_size": settings["pos_embed_max_size"],
        "mlp_ratio": MLP_RATIO,
        "txt_dim": settings["joint_attention_dim"],
        "pooled_dim": settings["pooled_projection_dim"],
    }
    return settings.build(SD3Config, values)


def settings_of(config: SD3Config) -> dict[str, Any]:
    """diffusers' config.json for a config. Raises UserError for what diffusers cannot express."""
    if config.mlp_ratio != MLP_RATIO:
        raise UserError(f"mlp_ratio is {config.mlp_ratio}; diffusers' SD3 knows only {MLP_RATIO}")
    return {
        "_class_name": CLASS,
        "sample_size": 128,
        "patch_size": config.patch_size,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.num_layers,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.txt_dim,
        "caption_projection_dim": config.hidden,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.position_size,
        "dual_attention_layers": list(range(config.num_dual_layers)),
        "qk_norm": "rms_norm" if config.qk_norm == "rms" else None,
    }


def schedule_of(settings: Settings) -> FlowSchedule:
    """The noise levels that diffusers' scheduler_config.json describes.

    diffusers' SD3 pipeline takes its levels from the scheduler, so that the last step starts from
    the lowest level that the model was trained at. Raises UserError as `formats.scheduler` does,
    and for a shift that depends on the picture's size.
    """
    schedule = flow_schedule_of(settings)
    if schedule.shift is None:
        raise UserError(f"{settings.where} shifts by the size; Stable Diffusion 3 by a constant")
    return constant_schedule(schedule.shift)


def constant_schedule(shift: float) -> FlowSchedule:
    """diffusers' levels at a constant shift, which it applies to the lowest level twice."""
    lowest = 1 / 1000
    return FlowSchedule(shift=shift, last_sigma=shift * lowest / (1 + (shift - 1) * lowest))


SCHEDULE = constant_schedule(SHIFT)
"""The noise levels of every released model."""
