"""FLUX.2 as a family of models."""

import re
from collections.abc import Mapping
from functools import partial

from taca_jax.autoencoders.patched_vae import PatchedVAEConfig
from taca_jax.families.base import (
    CallDefaults,
    DiffusersLayout,
    Family,
    LoRANames,
    OriginalLayout,
    Published,
)
from taca_jax.families.flux2 import bfl, diffusers, lora
from taca_jax.families.flux2.model import (
    FLUX2_DEV,
    FLUX2_KIND,
    KLEIN_4B,
    KLEIN_9B,
    KLEIN_BASE_4B,
    KLEIN_BASE_9B,
    Flux2Config,
)
from taca_jax.families.flux2.text import read_text
from taca_jax.nn.blocks import kept_products, layer_tokens
from taca_jax.nn.stacking import MLP_PRODUCTS, QKV_PRODUCTS
from taca_jax.text.qwen3 import QWEN3_4B, QWEN3_8B

FLUX2_VAE = PatchedVAEConfig(
    channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=128,
    groups=32,
    patch_size=2,
)

OF_4B, OF_9B = {"text_encoder": QWEN3_4B}, {"text_encoder": QWEN3_8B}

BASE_CALL = CallDefaults(text_length=512, resolution=1024, steps=50, guidance=4.0)
DISTILLED_CALL = CallDefaults(text_length=512, resolution=1024, steps=4, guidance=1.0)
"""As in the original's examples."""


def _defaults_of(config: Flux2Config) -> CallDefaults:
    return DISTILLED_CALL if config.distilled else BASE_CALL


def _attention_pairs(config: Flux2Config, image: int, text: int) -> int:
    return (config.num_double_blocks + config.num_single_blocks) * (image + text) ** 2


def _kept_products(config: Flux2Config, path: str) -> Mapping[str, float]:
    if path != "single_blocks.qkv_mlp":
        return kept_products(path)
    qkv, mlp = 3 * config.hidden, 2 * config.mlp_hidden
    return {QKV_PRODUCTS: qkv / (qkv + mlp), MLP_PRODUCTS: mlp / (qkv + mlp)}


FLUX2 = Family(
    kind=FLUX2_KIND,
    title="FLUX.2",
    text_encoders="FLUX.2 [klein] has Qwen3; that of dev, Mistral, is not supported",
    tiny_autoencoder="none is supported",
    read_text=read_text,
    published={
        "flux2-klein-base-4b": Published(
            "flux.2-klein-base-4b",
            KLEIN_BASE_4B,
            OF_4B,
            "black-forest-labs/FLUX.2-klein-base-4B",
        ),
        "flux2-klein-base-9b": Published(
            "flux.2-klein-base-9b",
            KLEIN_BASE_9B,
            OF_9B,
            "black-forest-labs/FLUX.2-klein-base-9B",
        ),
        "flux2-klein-4b": Published(
            "flux.2-klein-4b", KLEIN_4B, OF_4B, "black-forest-labs/FLUX.2-klein-4B"
        ),
        "flux2-klein-9b": Published(
            "flux.2-klein-9b", KLEIN_9B, OF_9B, "black-forest-labs/FLUX.2-klein-9B"
        ),
        "flux2-dev": Published("flux.2-dev", FLUX2_DEV, {}, "black-forest-labs/FLUX.2-dev"),
    },
    autoencoder=FLUX2_VAE,
    defaults_of=_defaults_of,
    schedule_of=lambda _: diffusers.SCHEDULE,
    diffusers=DiffusersLayout(
        class_name=diffusers.CLASS,
        config_of=diffusers.config_of,
        settings_of=diffusers.settings_of,
        table_of=lambda _: diffusers.TABLE,
        schedule_of=diffusers.schedule_of,
    ),
    original=OriginalLayout(
        author="Black Forest Labs",
        prefixes=(bfl.COMFY_PREFIX, ""),
        recognises=bfl.is_flux2,
        config_of=bfl.inferred,
        table_of=lambda _: bfl.TABLE,
        text_encoders={},
        unknown_fields={
            "axes_dim": "Rotary channels of (index, row, column, token), for a single file whose "
            "heads are not 128 wide.",
            "distilled": "Whether a single file is of a distilled model (klein, not its base): "
            "true or false (default).",
        },
        autoencoder_file="flux2-vae.safetensors",
    ),
    lora=LoRANames(
        targets=lora.ATTENTION_TARGETS, dialects=lambda _: lora.DIALECTS, model_of=lora.model_of
    ),
    attention_pairs=_attention_pairs,
    layer_tokens=partial(layer_tokens, joint=re.compile(r"single_blocks\..*")),
    kept_products=_kept_products,
    last_products=r"double_blocks\.(img|txt)\.mlp_out|single_blocks\.out",
    embeds_guidance=lambda config: config.guidance_embed,
)
