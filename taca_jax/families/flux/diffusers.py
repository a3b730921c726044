"""FLUX transformers as diffusers stores them (`FluxTransformer2DModel`), and LoRA names."""

from typing import Any

from taca_jax.errors import UserError
from taca_jax.families.flux.model import FluxConfig
from taca_jax.formats.key_table import SWAP_HALVES, TRANSPOSE_SWAPPED, Rule, Table, linear
from taca_jax.formats.settings import Settings

PATCH_SIZE = 2
"""diffusers packs 2 x 2 patches outside of the model, whose own patch size is 1."""
THETA, MLP_RATIO = 10_000, 4.0
"""Fixed in diffusers' code."""

CLASS = "FluxTransformer2DModel"

_DOUBLE, _SINGLE = "transformer_blocks.{layer}", "single_transformer_blocks.{layer}"


def _stream(
    ours: str, *, mod: str, qkv: tuple[str, str, str], norms: tuple[str, str], out: str, mlp: str
) -> tuple[Rule, ...]:
    """One modality of the double blocks, by what diffusers calls its parts."""
    q, k, v = qkv
    return (
        *linear(f"{_DOUBLE}.{mod}.linear", f"{ours}.mod"),
        *linear(f"{_DOUBLE}.attn.{q}", f"{ours}.qkv.q"),
        *linear(f"{_DOUBLE}.attn.{k}", f"{ours}.qkv.k"),
        *linear(f"{_DOUBLE}.attn.{v}", f"{ours}.qkv.v"),
        Rule(f"{_DOUBLE}.attn.{norms[0]}.weight", f"{ours}.qkv.q_norm.scale"),
        Rule(f"{_DOUBLE}.attn.{norms[1]}.weight", f"{ours}.qkv.k_norm.scale"),
        *linear(f"{_DOUBLE}.attn.{out}", f"{ours}.out"),
        *linear(f"{_DOUBLE}.{mlp}.net.0.proj", f"{ours}.mlp_in"),
        *linear(f"{_DOUBLE}.{mlp}.net.2", f"{ours}.mlp_out"),
    )


def _embedder(theirs: str, ours: str) -> tuple[Rule, ...]:
    theirs = f"time_text_embed.{theirs}"
    return (
        *linear(f"{theirs}.linear_1", f"{ours}.linear_1"),
        *linear(f"{theirs}.linear_2", f"{ours}.linear_2"),
    )


TABLE = Table(
    "a FLUX transformer in diffusers' layout",
    (
        *linear("x_embedder", "img_in"),
        *linear("context_embedder", "txt_in"),
        *_embedder("timestep_embedder", "time_in"),
        *_embedder("text_embedder", "vector_in"),
        *_embedder("guidance_embedder", "guidance_in"),
        *_stream(
            "double_blocks.img",
            mod="norm1",
            qkv=("to_q", "to_k", "to_v"),
            norms=("norm_q", "norm_k"),
            out="to_out.0",
            mlp="ff",
        ),
        *_stream(
            "double_blocks.txt",
            mod="norm1_context",
            qkv=("add_q_proj", "add_k_proj", "add_v_proj"),
            norms=("norm_added_q", "norm_added_k"),
            out="to_add_out",
            mlp="ff_context",
        ),
        *linear(f"{_SINGLE}.norm.linear", "single_blocks.mod"),
        *linear(f"{_SINGLE}.attn.to_q", "single_blocks.qkv.q"),
        *linear(f"{_SINGLE}.attn.to_k", "single_blocks.qkv.k"),
        *linear(f"{_SINGLE}.attn.to_v", "single_blocks.qkv.v"),
        Rule(f"{_SINGLE}.attn.norm_q.weight", "single_blocks.qkv.q_norm.scale"),
        Rule(f"{_SINGLE}.attn.norm_k.weight", "single_blocks.qkv.k_norm.scale"),
        *linear(f"{_SINGLE}.proj_mlp", "single_blocks.mlp_in"),
        *linear(f"{_SINGLE}.proj_out", "single_blocks.out"),
        # Theirs is (scale, shift); the original's and ours (shift, scale).
        Rule("norm_out.linear.weight", "final_mod.kernel", TRANSPOSE_SWAPPED),
        Rule("norm_out.linear.bias", "final_mod.bias", SWAP_HALVES),
        *linear("proj_out", "final_out"),
    ),
)


def config_of(settings: Settings) -> FluxConfig:
    """The config that diffusers' config.json stands for.

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
