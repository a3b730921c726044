"""FLUX transformers as diffusers stores them (`FluxTransformer2DModel`)."""

from typing import Any

from taca_jax.errors import UserError
from taca_jax.families.diffusers_names import embedder, joint_block, output_modulation, qkv
from taca_jax.families.flux.model import FluxConfig
from taca_jax.formats.key_table import Table, linear
from taca_jax.formats.settings import Settings

PATCH_SIZE = 2
"""diffusers packs 2 x 2 patches outside the model, and says patch_size 1 in its config."""
THETA, MLP_RATIO = 10_000, 4.0
"""Fixed in diffusers' code."""

CLASS = "FluxTransformer2DModel"

_SINGLE = "single_transformer_blocks.{layer}"

TABLE = Table(
    "a FLUX transformer in diffusers' layout",
    (
        *linear("x_embedder", "img_in"),
        *linear("context_embedder", "txt_in"),
        *embedder("timestep_embedder", "time_in"),
        *embedder("text_embedder", "vector_in"),
        *embedder("guidance_embedder", "guidance_in"),
        *joint_block("transformer_blocks.{layer}", "double_blocks"),
        *linear(f"{_SINGLE}.norm.linear", "single_blocks.mod"),
        *qkv(f"{_SINGLE}.attn", "single_blocks"),
        *linear(f"{_SINGLE}.proj_mlp", "single_blocks.mlp_in"),
        *linear(f"{_SINGLE}.proj_out", "single_blocks.out"),
        *output_modulation("norm_out", "final_mod"),
        *linear("proj_out", "final_out"),
    ),
)


def config_of(settings: Settings) -> FluxConfig:
    """The config that diffusers' config.json describes.

    Raises UserError for another class, and for variants whose inputs differ (Fill, Control, ...).
    """
    settings.expect("_class_name", CLASS)
    settings.expect("patch_size", 1)
    in_channels = settings.integer("in_channels")
    settings.expect("out_channels", in_channels)
    if in_channels % PATCH_SIZE**2:
        raise UserError(
            f"{settings.where} says in_channels {in_channels}; expected a multiple of "
            f"{PATCH_SIZE**2}, latent channels times {PATCH_SIZE} x {PATCH_SIZE} patches"
        )
    values = {
        "patch_size": PATCH_SIZE,
        "latent_channels": in_channels // PATCH_SIZE**2,
        "num_heads": settings["num_attention_heads"],
        "head_dim": settings["attention_head_dim"],
        "axes_dim": settings.get("axes_dims_rope", (16, 56, 56)),
        "theta": THETA,
        "num_double_blocks": settings["num_layers"],
        "num_single_blocks": settings["num_single_layers"],
        "mlp_ratio": MLP_RATIO,
        "txt_dim": settings["joint_attention_dim"],
        "pooled_dim": settings["pooled_projection_dim"],
        "guidance_embed": settings["guidance_embeds"],
    }
    return settings.build(FluxConfig, values)


def settings_of(config: FluxConfig) -> dict[str, Any]:
    """diffusers' config.json for a config. Raises UserError for what diffusers cannot express."""
    fixed = (config.theta, config.mlp_ratio)
    if fixed != (THETA, MLP_RATIO):
        raise UserError(
            f"theta and mlp_ratio are {fixed}; diffusers' FLUX knows only {(THETA, MLP_RATIO)}"
        )
    return {
        "_class_name": CLASS,
        "patch_size": 1,
        "in_channels": config.latent_channels * config.patch_size**2,
        "out_channels": None,
        "num_layers": config.num_double_blocks,
        "num_single_layers": config.num_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.txt_dim,
        "pooled_projection_dim": config.pooled_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }
