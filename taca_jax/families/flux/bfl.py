"""FLUX transformers in Black Forest Labs' own single files (`flux1-dev.safetensors`).

The layout is that of black-forest-labs/flux, model.py: projections to q, k and v are one tensor, in
single blocks together with the MLP's. ComfyUI's files prefix every name.
"""

from taca_jax.errors import UserError
from taca_jax.families.flux.diffusers import PATCH_SIZE, THETA
from taca_jax.families.flux.model import FLUX_DEV, FluxConfig
from taca_jax.formats.key_table import Rule, Table, fused_linear, linear
from taca_jax.formats.tensor_files import Tensors, layers_of, shape_of

COMFY_PREFIX = "model.diffusion_model."

_DOUBLE, _SINGLE = "double_blocks.{layer}", "single_blocks.{layer}"


def _stream(name: str) -> tuple[Rule, ...]:
    """One modality of the double blocks, `img` or `txt`."""
    theirs, ours = f"{_DOUBLE}.{name}", f"double_blocks.{name}"
    return (
        *linear(f"{theirs}_mod.lin", f"{ours}.mod"),
        *fused_linear(f"{theirs}_attn.qkv", *(f"{ours}.qkv.{x}" for x in "qkv")),
        Rule(f"{theirs}_attn.norm.query_norm.scale", f"{ours}.qkv.q_norm.scale"),
        Rule(f"{theirs}_attn.norm.key_norm.scale", f"{ours}.qkv.k_norm.scale"),
        *linear(f"{theirs}_attn.proj", f"{ours}.out"),
        *linear(f"{theirs}_mlp.0", f"{ours}.mlp_in"),
        *linear(f"{theirs}_mlp.2", f"{ours}.mlp_out"),
    )


def _embedder(name: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{name}.in_layer", f"{name}.linear_1"),
        *linear(f"{name}.out_layer", f"{name}.linear_2"),
    )


TABLE = Table(
    "a FLUX transformer in Black Forest Labs' layout",
    (
        *linear("img_in", "img_in"),
        *linear("txt_in", "txt_in"),
        *_embedder("time_in"),
        *_embedder("vector_in"),
        *_embedder("guidance_in"),
        *_stream("img"),
        *_stream("txt"),
        *linear(f"{_SINGLE}.modulation.lin", "single_blocks.mod"),
        *fused_linear(
            f"{_SINGLE}.linear1",
            *(f"single_blocks.qkv.{x}" for x in "qkv"),
            "single_blocks.mlp_in",
        ),
        *linear(f"{_SINGLE}.linear2", "single_blocks.out"),
        Rule(f"{_SINGLE}.norm.query_norm.scale", "single_blocks.qkv.q_norm.scale"),
        Rule(f"{_SINGLE}.norm.key_norm.scale", "single_blocks.qkv.k_norm.scale"),
        *linear("final_layer.adaLN_modulation.1", "final_mod"),
        *linear("final_layer.linear", "final_out"),
    ),
)


def is_flux(tensors: Tensors) -> bool:
    """Whether the names, without a prefix, are of this layout."""
    # FLUX.2 has no modulation of its own in each block.
    return {
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mod.lin.weight",
        "img_in.weight",
    } <= tensors.shapes.keys()


def inferred(tensors: Tensors, axes_dim: tuple[int, int, int] | None = None) -> FluxConfig:
    """The config, inferred from the shapes; theta is the original's.

    axes_dim: the rotary channels of (index, row, column), which no shape shows; by default those of
    the released models, if heads are as wide as theirs. Raises UserError if it must be given, and
    for variants whose inputs differ (Fill, Canny, Depth, ...).
    """
    hidden, in_channels = shape_of(tensors, "img_in.weight", 2)
    out_channels, _ = shape_of(tensors, "final_layer.linear.weight", 2)
    if in_channels != out_channels or in_channels % PATCH_SIZE**2:
        raise UserError(
            f"{tensors.where} takes {in_channels} channels and gives {out_channels}; expected the "
            f"same multiple of {PATCH_SIZE**2}; variants like Fill and Canny are not supported"
        )
    (head_dim,) = shape_of(tensors, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    mlp_hidden, _ = shape_of(tensors, "double_blocks.0.img_mlp.0.weight", 2)
    _, txt_dim = shape_of(tensors, "txt_in.weight", 2)
    _, pooled_dim = shape_of(tensors, "vector_in.in_layer.weight", 2)
    if not hidden or not head_dim or hidden % head_dim:
        raise UserError(
            f"{tensors.where} has {hidden} channels in heads of {head_dim}, which must divide them"
        )
    if axes_dim is None:
        if head_dim != FLUX_DEV.head_dim:
            raise UserError(
                f"{tensors.where} has heads of {head_dim} channels, and only for "
                f"{FLUX_DEV.head_dim} is it known how positions share them; give axes_dim, three "
                f"even numbers that sum to {head_dim}"
            )
        axes_dim = FLUX_DEV.axes_dim
    return FluxConfig(
        patch_size=PATCH_SIZE,
        latent_channels=in_channels // PATCH_SIZE**2,
        num_heads=hidden // head_dim,
        head_dim=head_dim,
        axes_dim=axes_dim,
        theta=THETA,
        num_double_blocks=layers_of(tensors, r"double_blocks\.(\d+)\..*"),
        num_single_blocks=layers_of(tensors, r"single_blocks\.(\d+)\..*"),
        mlp_ratio=mlp_hidden / hidden,
        txt_dim=txt_dim,
        pooled_dim=pooled_dim,
        guidance_embed="guidance_in.in_layer.weight" in tensors.shapes,
    )
