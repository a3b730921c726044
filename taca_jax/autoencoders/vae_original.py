"""FLUX's and SD3's autoencoders in their original layout (`ae.safetensors`).

The layout is that of black-forest-labs/flux, modules/autoencoder.py, and of earlier Stable
Diffusion checkpoints. It differs from diffusers' in that attention projections are 1 x 1
convolutions, and that the decoder's levels are numbered from the image to the latents.
"""

from dataclasses import replace

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.errors import UserError
from taca_jax.formats.key_table import POINTWISE, Rule, Table, convolution, norm
from taca_jax.formats.tensor_files import Tensors, layers_of, shape_of

GROUPS = 32
"""Groups of the norms; fixed in the original's code, and not visible in any shape."""


def _resnet(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{theirs}.norm1", f"{ours}.norm1"),
        *convolution(f"{theirs}.conv1", f"{ours}.conv1"),
        *norm(f"{theirs}.norm2", f"{ours}.norm2"),
        *convolution(f"{theirs}.conv2", f"{ours}.conv2"),
        *convolution(f"{theirs}.nin_shortcut", f"{ours}.shortcut"),
    )


def _projection(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{theirs}.weight", f"{ours}.kernel", POINTWISE),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    )


def _ends(net: str) -> tuple[Rule, ...]:
    """The first and last convolutions and the middle block of the encoder or decoder."""
    theirs, ours = f"{net}.mid", f"{net}.mid_block"
    return (
        *convolution(f"{net}.conv_in", f"{net}.conv_in"),
        *_resnet(f"{theirs}.block_1", f"{ours}.resnets.0"),
        *norm(f"{theirs}.attn_1.norm", f"{ours}.attention.norm"),
        *_projection(f"{theirs}.attn_1.q", f"{ours}.attention.q"),
        *_projection(f"{theirs}.attn_1.k", f"{ours}.attention.k"),
        *_projection(f"{theirs}.attn_1.v", f"{ours}.attention.v"),
        *_projection(f"{theirs}.attn_1.proj_out", f"{ours}.attention.out"),
        *_resnet(f"{theirs}.block_2", f"{ours}.resnets.1"),
        *norm(f"{net}.norm_out", f"{net}.norm_out"),
        *convolution(f"{net}.conv_out", f"{net}.conv_out"),
    )


def _level(theirs: str, ours: str, resample: str) -> tuple[Rule, ...]:
    return (
        *_resnet(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}"),
        *convolution(f"{theirs}.{resample}.conv", f"{ours}.{resample}"),
    )


def table_of(config: VAEConfig) -> Table:
    """The key table of an autoencoder of this config."""
    levels = len(config.channels)
    return Table(
        "an autoencoder in its original layout",
        (
            *_ends("encoder"),
            *_level("encoder.down.{i}", "encoder.down_blocks.{i}", "downsample"),
            *_ends("decoder"),
            *(
                rule
                for i in range(levels)
                for rule in _level(
                    f"decoder.up.{levels - 1 - i}", f"decoder.up_blocks.{i}", "upsample"
                )
            ),
        ),
    )


def is_autoencoder(tensors: Tensors) -> bool:
    """Whether the names, without a prefix, are of this layout."""
    return {
        "encoder.mid.attn_1.q.weight",
        "decoder.mid.attn_1.q.weight",
    } <= tensors.shapes.keys()


def inferred(tensors: Tensors, like: VAEConfig) -> VAEConfig:
    """The config, inferred from the shapes, with the latents' scale and shift of `like`.

    Raises UserError if a tensor that determines it is missing.
    """
    levels = layers_of(tensors, r"encoder\.down\.(\d+)\..*")
    if not levels:
        raise UserError(f"{tensors.where} has no encoder.down; is it another model's?")
    channels = tuple(
        shape_of(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)
    )
    _, latent_channels, *_ = shape_of(tensors, "decoder.conv_in.weight", 4)
    _, image_channels, *_ = shape_of(tensors, "encoder.conv_in.weight", 4)
    if any(not width or width % GROUPS for width in channels):
        raise UserError(
            f"{tensors.where} has levels of {channels} channels; each must be a multiple of "
            f"{GROUPS}, the groups of its norms"
        )
    return replace(
        like,
        channels=channels,
        layers_per_block=layers_of(tensors, r"encoder\.down\.0\.block\.(\d+)\..*"),
        latent_channels=latent_channels,
        image_channels=image_channels,
        groups=GROUPS,
    )
