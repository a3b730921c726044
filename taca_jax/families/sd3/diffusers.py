"""Stable Diffusion 3 transformers as diffusers stores them (`SD3Transformer2DModel`)."""

from dataclasses import replace
from typing import Any

import numpy as np

from taca_jax.errors import UserError
from taca_jax.families.sd3.model import SD3Config
from taca_jax.formats.key_table import (
    SWAP_HALVES,
    TRANSPOSE_SWAPPED,
    Rule,
    Table,
    Transform,
    linear,
)
from taca_jax.formats.scheduler import schedule_of as flow_schedule_of
from taca_jax.formats.settings import Settings
from taca_jax.sampling.schedule import FlowSchedule

MLP_RATIO = 4.0
"""Fixed in diffusers' code."""

SHIFT = 3.0
"""Of the noise levels, in every released model."""

CLASS = "SD3Transformer2DModel"
BLOCK = "transformer_blocks.{layer}"


def patch_rules(embed: str, out: str, config: SD3Config, *, positions: str) -> tuple[Rule, ...]:
    """What turns patches into tokens and back, in both layouts of SD3; `positions` is the table.

    Theirs is a convolution on the way in, and gives (row, column, channel) on the way out; our
    tokens are (channel, row, column) on both.
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


def _qkv(
    block: str, attn: str, ours: str, *, names: tuple[str, str, str], norms: tuple[str, str]
) -> tuple[Rule, ...]:
    theirs = f"{block}.{attn}"
    return (
        *(
            rule
            for name, x in zip(names, "qkv", strict=True)
            for rule in linear(f"{theirs}.{name}", f"{ours}.qkv.{x}")
        ),
        Rule(f"{theirs}.{norms[0]}.weight", f"{ours}.qkv.q_norm.scale"),
        Rule(f"{theirs}.{norms[1]}.weight", f"{ours}.qkv.k_norm.scale"),
    )


_IMG = {"names": ("to_q", "to_k", "to_v"), "norms": ("norm_q", "norm_k")}
_TXT = {
    "names": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "norms": ("norm_added_q", "norm_added_k"),
}


def _stream(block: str, ours: str, *, mod: str, out: str, mlp: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{block}.{mod}.linear", f"{ours}.mod"),
        *linear(f"{block}.attn.{out}", f"{ours}.out"),
        *linear(f"{block}.{mlp}.net.0.proj", f"{ours}.mlp_in"),
        *linear(f"{block}.{mlp}.net.2", f"{ours}.mlp_out"),
    )


def _image(block: str, ours: str) -> tuple[Rule, ...]:
    return (
        *_stream(block, f"{ours}.img", mod="norm1", out="to_out.0", mlp="ff"),
        *_qkv(block, "attn", f"{ours}.img", **_IMG),
    )


def joint_block(block: str, ours: str, *, dual: bool) -> tuple[Rule, ...]:
    """A block whose text goes on, by the names of the whole block there and here."""
    own = (
        (
            *_qkv(block, "attn2", f"{ours}.img_attn", **_IMG),
            *linear(f"{block}.attn2.to_out.0", f"{ours}.img_attn.out"),
        )
        if dual
        else ()
    )
    return (
        *_image(block, ours),
        *_stream(block, f"{ours}.txt", mod="norm1_context", out="to_add_out", mlp="ff_context"),
        *_qkv(block, "attn", f"{ours}.txt", **_TXT),
        *own,
    )


def _last_block(block: str, ours: str) -> tuple[Rule, ...]:
    mod = f"{block}.norm1_context.linear"
    return (
        *_image(block, ours),
        *_qkv(block, "attn", f"{ours}.txt", **_TXT),
        # Theirs is (scale, shift); the original's and ours (shift, scale).
        Rule(f"{mod}.weight", f"{ours}.txt.mod.kernel", TRANSPOSE_SWAPPED),
        Rule(f"{mod}.bias", f"{ours}.txt.mod.bias", SWAP_HALVES),
    )


def only(layers: range, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules of a stack, for those of their layers that it holds."""
    return tuple(replace(rule, layers=layers) for rule in rules)


def table_of(config: SD3Config) -> Table:
    """The table of a transformer, whose layers are of the kinds that the config says."""
    dual, last = config.num_dual_layers, config.num_layers - 1
    embedders = {"timestep_embedder": "time_in", "text_embedder": "vector_in"}
    return Table(
        "a Stable Diffusion 3 transformer in diffusers' layout",
        (
            *patch_rules("pos_embed.proj", "proj_out", config, positions="pos_embed.pos_embed"),
            *linear("context_embedder", "txt_in"),
            *(
                rule
                for theirs, ours in embedders.items()
                for n in (1, 2)
                for rule in linear(f"time_text_embed.{theirs}.linear_{n}", f"{ours}.linear_{n}")
            ),
            *only(range(dual), joint_block(BLOCK, "dual_blocks", dual=True)),
            *only(range(dual, last), joint_block(BLOCK, "joint_blocks", dual=False)),
            *_last_block(BLOCK.format(layer=last), "last_block"),
            Rule("norm_out.linear.weight", "final_mod.kernel", TRANSPOSE_SWAPPED),
            Rule("norm_out.linear.bias", "final_mod.bias", SWAP_HALVES),
        ),
    )


def config_of(settings: Settings) -> SD3Config:
    """The config that diffusers' config.json stands for.

    Raises UserError for another class, and for what no Stable Diffusion 3 has.
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
    """The noise levels that diffusers' scheduler_config.json stands for.

    Raises UserError as `formats.scheduler` does, and for shifts by the picture's size. In this
    pipeline the scheduler says which levels are visited: the last step starts from the least level
    that the model was trained at.
    """
    schedule = flow_schedule_of(settings)
    if schedule.shift is None:
        raise UserError(f"{settings.where} shifts by the size; Stable Diffusion 3 by a constant")
    return constant_schedule(schedule.shift)


def constant_schedule(shift: float) -> FlowSchedule:
    """The scheduler's levels at a constant shift: the least is shifted here, and again with all."""
    least = 1 / 1000
    return FlowSchedule(shift=shift, last_sigma=shift * least / (1 + (shift - 1) * least))


SCHEDULE = constant_schedule(SHIFT)
"""Of every released model."""
