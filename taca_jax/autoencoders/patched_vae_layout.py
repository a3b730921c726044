"""FLUX.2's autoencoder as diffusers stores it (`AutoencoderKLFlux2`), and in its original layout.

The original layout is that of earlier autoencoders, whose key tables are used here: the
convolutions of 1 x 1 are parts of the encoder and of the decoder there, and the statistics of the
latents are those of a batch norm.
"""

from dataclasses import replace
from typing import Any

from taca_jax.autoencoders import vae_diffusers, vae_original
from taca_jax.autoencoders.patched_vae import EPSILON, PatchedVAEConfig
from taca_jax.errors import UserError
from taca_jax.formats.key_table import POINTWISE, Rule, Table
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import Tensors

CLASS = "AutoencoderKLFlux2"

ORIGINAL = "an autoencoder of patches in its original layout"

_MEAN, _VARIANCE = "bn.running_mean", "bn.running_var"
_IGNORED = (r"bn\.num_batches_tracked",)


def _rules(encoder: str, decoder: str) -> tuple[Rule, ...]:
    """What other autoencoders lack; `encoder` and `decoder` are prefixes of its names."""
    return (
        Rule(f"{encoder}quant_conv.weight", "quant_conv.kernel", POINTWISE),
        Rule(f"{encoder}quant_conv.bias", "quant_conv.bias"),
        Rule(f"{decoder}post_quant_conv.weight", "post_quant_conv.kernel", POINTWISE),
        Rule(f"{decoder}post_quant_conv.bias", "post_quant_conv.bias"),
        Rule(_MEAN, "latent_norm.mean"),
        Rule(_VARIANCE, "latent_norm.variance"),
    )


TABLE = Table(
    "an autoencoder of patches in diffusers' layout",
    (*vae_diffusers.TABLE.rules, *_rules("", "")),
    _IGNORED,
)


def config_of(settings: Settings) -> PatchedVAEConfig:
    """The config that diffusers' config.json describes.

    Raises UserError for another class, and for options that FLUX.2's does not use.
    """
    settings.expect("_class_name", CLASS)
    settings.expect("use_quant_conv", True)
    settings.expect("use_post_quant_conv", True)
    settings.expect("mid_block_add_attention", True)
    settings.expect("decoder_block_out_channels", settings["block_out_channels"])
    settings.expect("batch_norm_eps", EPSILON)
    patch, *others = settings.get("patch_size", [2, 2])
    if others != [patch]:
        raise UserError(f"{settings.where} says patch_size {[patch, *others]}; expected a square")
    values = {
        "channels": settings["block_out_channels"],
        "layers_per_block": settings["layers_per_block"],
        "latent_channels": settings.integer("latent_channels") * patch**2,
        "groups": settings["norm_num_groups"],
        "image_channels": settings["in_channels"],
        "patch_size": patch,
    }
    return settings.build(PatchedVAEConfig, values)


def settings_of(config: PatchedVAEConfig) -> dict[str, Any]:
    """diffusers' config.json for a config."""
    others = vae_diffusers.settings_of(config.inner)
    for name in ("scaling_factor", "shift_factor"):
        del others[name]
    return {
        **others,
        "_class_name": CLASS,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "batch_norm_eps": EPSILON,
        "patch_size": [config.patch_size] * 2,
    }


def is_patched(tensors: Tensors) -> bool:
    """Whether an autoencoder in the original layout is FLUX.2's."""
    return _MEAN in tensors.shapes


def original_table_of(config: PatchedVAEConfig) -> Table:
    """The key table of the original layout."""
    others = vae_original.table_of(config.inner)
    return Table(
        ORIGINAL,
        (*others.rules, *_rules("encoder.", "decoder.")),
        _IGNORED,
    )


def inferred(tensors: Tensors) -> PatchedVAEConfig:
    """The config of an autoencoder in the original layout, inferred from the shapes.

    Raises UserError if a tensor that determines it is missing, and for patches that are no squares.
    """
    like = PatchedVAEConfig(channels=(1,), layers_per_block=1, latent_channels=4, groups=1)
    inner = vae_original.inferred(tensors, like.inner)
    (channels,) = tensors.shapes[_MEAN]
    patch = round((channels / inner.latent_channels) ** 0.5)
    if patch**2 * inner.latent_channels != channels:
        raise UserError(
            f"{tensors.where} has statistics of {channels} channels for {inner.latent_channels}; "
            "expected a square number of times as many"
        )
    return replace(
        like,
        channels=inner.channels,
        layers_per_block=inner.layers_per_block,
        latent_channels=channels,
        groups=inner.groups,
        image_channels=inner.image_channels,
        patch_size=patch,
    )
