"""FLUX.2 transformers in Black Forest Labs' own single files (`flux-2-klein-base-4b.safetensors`).

The layout is that of black-forest-labs/flux2, model.py: q, k and v of double blocks are one tensor,
and the output modulation is (shift, scale), as ours. ComfyUI's files prefix every name.
"""

from taca_jax.errors import UserError
from taca_jax.families.flux2.model import KLEIN_BASE_4B, Flux2Config
from taca_jax.formats.key_table import Rule, Table, fused_linear, linear
from taca_jax.formats.tensor_files import Tensors, layers_of, shape_of

COMFY_PREFIX = "model.diffusion_model."

_DOUBLE, _SINGLE = "double_blocks.{layer}", "single_blocks.{layer}"
_SHARED = "single_stream_modulation.lin.weight"


def _stream(name: str) -> tuple[Rule, ...]:
    """One modality of the double blocks, `img` or `txt`."""
    theirs, ours = f"{_DOUBLE}.{name}", f"double_blocks.{name}"
    return (
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
    "a FLUX.2 transformer in Black Forest Labs' layout",
    (
        *linear("img_in", "img_in"),
        *linear("txt_in", "txt_in"),
        *_embedder("time_in"),
        *_embedder("guidance_in"),
        *linear("double_stream_modulation_img.lin", "img_mod"),
        *linear("double_stream_modulation_txt.lin", "txt_mod"),
        *linear("single_stream_modulation.lin", "single_mod"),
        *_stream("img"),
        *_stream("txt"),
        *linear(f"{_SINGLE}.linear1", "single_blocks.qkv_mlp"),
        *linear(f"{_SINGLE}.linear2", "single_blocks.out"),
        Rule(f"{_SINGLE}.norm.query_norm.scale", "single_blocks.q_norm.scale"),
        Rule(f"{_SINGLE}.norm.key_norm.scale", "single_blocks.k_norm.scale"),
        *linear("final_layer.adaLN_modulation.1", "final_mod"),
        *linear("final_layer.linear", "final_out"),
    ),
)


def is_flux2(tensors: Tensors) -> bool:
    """Whether the names, without a prefix, are of this layout."""
    return {_SHARED, "double_blocks.0.img_attn.qkv.weight"} <= tensors.shapes.keys()


def inferred(
    tensors: Tensors,
    axes_dim: tuple[int, int, int, int] | None = None,
    distilled: bool | None = None,
) -> Flux2Config:
    """The config, inferred from the shapes; theta is the original's.

    axes_dim: the rotary channels of (index, row, column, token), which no shape shows; by default
    those of the released models, if heads are as wide as theirs. distilled: by default not. Raises
    UserError if axes_dim must be given, and for shapes that do not fit together.
    """
    hidden, in_channels = shape_of(tensors, "img_in.weight", 2)
    out_channels, _ = shape_of(tensors, "final_layer.linear.weight", 2)
    if in_channels != out_channels:
        raise UserError(
            f"{tensors.where} takes {in_channels} channels and gives {out_channels}; expected the "
            "same number"
        )
    (head_dim,) = shape_of(tensors, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    _, mlp_hidden = shape_of(tensors, "double_blocks.0.img_mlp.2.weight", 2)
    _, txt_dim = shape_of(tensors, "txt_in.weight", 2)
    if not hidden or not head_dim or hidden % head_dim:
        raise UserError(
            f"{tensors.where} has {hidden} channels in heads of {head_dim}, which must divide them"
        )
    if axes_dim is None:
        if head_dim != KLEIN_BASE_4B.head_dim:
            raise UserError(
                f"{tensors.where} has heads of {head_dim} channels, and only for "
                f"{KLEIN_BASE_4B.head_dim} is it known how positions share them; give axes_dim, "
                f"four even numbers that sum to {head_dim}"
            )
        axes_dim = KLEIN_BASE_4B.axes_dim
    return Flux2Config(
        latent_channels=in_channels,
        num_heads=hidden // head_dim,
        head_dim=head_dim,
        axes_dim=axes_dim,
        theta=KLEIN_BASE_4B.theta,
        num_double_blocks=layers_of(tensors, r"double_blocks\.(\d+)\..*"),
        num_single_blocks=layers_of(tensors, r"single_blocks\.(\d+)\..*"),
        mlp_ratio=mlp_hidden / hidden,
        txt_dim=txt_dim,
        guidance_embed="guidance_in.in_layer.weight" in tensors.shapes,
        distilled=bool(distilled),
    )
