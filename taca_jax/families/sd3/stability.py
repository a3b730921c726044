"""Stable Diffusion 3 transformers in Stability AI's single files (`sd3.5_medium.safetensors`).

The layout is that of Stability-AI/sd3.5, mmditx.py: q, k and v are one tensor, and the output
modulation is (shift, scale), as ours. In the files every name has a prefix.
"""

from taca_jax.errors import UserError
from taca_jax.families.sd3.diffusers import only, patch_rules
from taca_jax.families.sd3.model import SD3Config
from taca_jax.formats.key_table import Rule, Table, fused_linear, linear
from taca_jax.formats.tensor_files import Tensors, layers_of, shape_of

PREFIX = "model.diffusion_model."
HEAD_DIM = 64
"""Fixed in the original's code; no shape shows it in models without a norm of queries and keys."""

BLOCK = "joint_blocks.{layer}"


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *fused_linear(f"{theirs}.qkv", *(f"{ours}.qkv.{x}" for x in "qkv")),
        Rule(f"{theirs}.ln_q.weight", f"{ours}.qkv.q_norm.scale"),
        Rule(f"{theirs}.ln_k.weight", f"{ours}.qkv.k_norm.scale"),
    )


def _stream(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{theirs}.adaLN_modulation.1", f"{ours}.mod"),
        *_attention(f"{theirs}.attn", ours),
        *linear(f"{theirs}.attn.proj", f"{ours}.out"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}.mlp_in"),
        *linear(f"{theirs}.mlp.fc2", f"{ours}.mlp_out"),
    )


def joint_block(block: str, ours: str, *, dual: bool) -> tuple[Rule, ...]:
    """The rules of a block other than the last, by its prefix in their names and in ours."""
    image_attention = (
        (
            *_attention(f"{block}.x_block.attn2", f"{ours}.img_attn"),
            *linear(f"{block}.x_block.attn2.proj", f"{ours}.img_attn.out"),
        )
        if dual
        else ()
    )
    return (
        *_stream(f"{block}.x_block", f"{ours}.img"),
        *_stream(f"{block}.context_block", f"{ours}.txt"),
        *image_attention,
    )


def _last_block(block: str, ours: str) -> tuple[Rule, ...]:
    txt = f"{block}.context_block"
    return (
        *_stream(f"{block}.x_block", f"{ours}.img"),
        *linear(f"{txt}.adaLN_modulation.1", f"{ours}.txt.mod"),
        *_attention(f"{txt}.attn", f"{ours}.txt"),
    )


def table_of(config: SD3Config) -> Table:
    """The key table of a transformer of this config."""
    dual, last = config.num_dual_layers, config.num_layers - 1
    embedders = {"t_embedder": "time_in", "y_embedder": "vector_in"}
    return Table(
        "a Stable Diffusion 3 transformer in Stability AI's layout",
        (
            *patch_rules("x_embedder.proj", "final_layer.linear", config, positions="pos_embed"),
            *linear("context_embedder", "txt_in"),
            *(
                rule
                for theirs, ours in embedders.items()
                for n, number in ((0, 1), (2, 2))
                for rule in linear(f"{theirs}.mlp.{n}", f"{ours}.linear_{number}")
            ),
            *only(range(dual), joint_block(BLOCK, "dual_blocks", dual=True)),
            *only(range(dual, last), joint_block(BLOCK, "joint_blocks", dual=False)),
            *_last_block(BLOCK.format(layer=last), "last_block"),
            *linear("final_layer.adaLN_modulation.1", "final_mod"),
        ),
    )


def is_sd3(tensors: Tensors) -> bool:
    """Whether the names, without a prefix, are of this layout."""
    return {
        "joint_blocks.0.x_block.attn.qkv.weight",
        "x_embedder.proj.weight",
    } <= tensors.shapes.keys()


def inferred(tensors: Tensors) -> SD3Config:
    """The config, inferred from the shapes.

    Raises UserError if a tensor that determines it is missing or has an impossible shape.
    """
    hidden, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    _, positions, _ = shape_of(tensors, "pos_embed", 3)
    _, txt_dim = shape_of(tensors, "context_embedder.weight", 2)
    _, pooled_dim = shape_of(tensors, "y_embedder.mlp.0.weight", 2)
    mlp_hidden, _ = shape_of(tensors, "joint_blocks.0.x_block.mlp.fc1.weight", 2)
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    (head_dim,) = shape_of(tensors, norm, 1) if norm in tensors.shapes else (HEAD_DIM,)
    size = round(positions**0.5)
    if not hidden or not head_dim or hidden % head_dim:
        raise UserError(
            f"{tensors.where} has {hidden} channels in heads of {head_dim}, which must divide them"
        )
    if size * size != positions:
        raise UserError(f"{tensors.where} has {positions} positions; expected a square number")
    return SD3Config(
        patch_size=patch,
        latent_channels=channels,
        num_heads=hidden // head_dim,
        head_dim=head_dim,
        num_layers=layers_of(tensors, r"joint_blocks\.(\d+)\..*"),
        num_dual_layers=layers_of(tensors, r"joint_blocks\.(\d+)\.x_block\.attn2\..*"),
        qk_norm="rms" if norm in tensors.shapes else "none",
        position_size=size,
        mlp_ratio=mlp_hidden / hidden,
        txt_dim=txt_dim,
        pooled_dim=pooled_dim,
    )
