"""FLUX's and SD3's autoencoders as diffusers stores them (`AutoencoderKL`)."""

from typing import Any

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.formats.key_table import Rule, Table, convolution, linear, norm
from taca_jax.formats.settings import Settings

CLASS = "AutoencoderKL"


def _resnets(block: str) -> tuple[Rule, ...]:
    theirs = ours = f"{block}.resnets.{{j}}"
    return (
        *norm(f"{theirs}.norm1", f"{ours}.norm1"),
        *convolution(f"{theirs}.conv1", f"{ours}.conv1"),
        *norm(f"{theirs}.norm2", f"{ours}.norm2"),
        *convolution(f"{theirs}.conv2", f"{ours}.conv2"),
        *convolution(f"{theirs}.conv_shortcut", f"{ours}.shortcut"),
    )


def _net(net: str, blocks: str, resample: str) -> tuple[Rule, ...]:
    """Encoder or decoder; `blocks` and `resample` are the names of its down or up blocks."""
    theirs, ours = f"{net}.mid_block.attentions.0", f"{net}.mid_block.attention"
    return (
        *convolution(f"{net}.conv_in", f"{net}.conv_in"),
        *_resnets(f"{net}.{blocks}.{{i}}"),
        *convolution(
            f"{net}.{blocks}.{{i}}.{resample}rs.0.conv", f"{net}.{blocks}.{{i}}.{resample}"
        ),
        *_resnets(f"{net}.mid_block"),
        *norm(f"{theirs}.group_norm", f"{ours}.norm"),
        *linear(f"{theirs}.to_q", f"{ours}.q"),
        *linear(f"{theirs}.to_k", f"{ours}.k"),
        *linear(f"{theirs}.to_v", f"{ours}.v"),
        *linear(f"{theirs}.to_out.0", f"{ours}.out"),
        *norm(f"{net}.conv_norm_out", f"{net}.norm_out"),
        *convolution(f"{net}.conv_out", f"{net}.conv_out"),
    )


TABLE = Table(
    "an autoencoder in diffusers' layout",
    (
        *_net("encoder", blocks="down_blocks", resample="downsample"),
        *_net("decoder", blocks="up_blocks", resample="upsample"),
    ),
)


def config_of(settings: Settings) -> VAEConfig:
    """The config that diffusers' config.json describes.

    Raises UserError for another class, and for options that FLUX's and SD3's do not use.
    """
    settings.expect("_class_name", CLASS)
    settings.expect("use_quant_conv", False)
    settings.expect("use_post_quant_conv", False)
    settings.expect("mid_block_add_attention", True)
    values = {
        "channels": settings["block_out_channels"],
        "layers_per_block": settings["layers_per_block"],
        "latent_channels": settings["latent_channels"],
        "groups": settings["norm_num_groups"],
        "scaling_factor": settings["scaling_factor"],
        "shift_factor": settings["shift_factor"],
        "image_channels": settings["in_channels"],
    }
    return settings.build(VAEConfig, values)


def settings_of(config: VAEConfig) -> dict[str, Any]:
    """diffusers' config.json for a config."""
    levels = len(config.channels)
    return {
        "_class_name": CLASS,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "act_fn": "silu",
        "sample_size": 1024,
        "mid_block_add_attention": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
