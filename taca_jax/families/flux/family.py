"""FLUX.1 as a family of models."""

import re
from functools import partial

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.families.base import (
    CallDefaults,
    DiffusersLayout,
    Family,
    LoRANames,
    OriginalLayout,
    Published,
)
from taca_jax.families.flux import bfl, diffusers, lora
from taca_jax.families.flux.model import (
    FLUX_DEV,
    FLUX_KIND,
    FLUX_KREA,
    FLUX_SCHNELL,
    FluxConfig,
    FluxTransformer,
)
from taca_jax.families.flux.text import read_text
from taca_jax.formats.scheduler import schedule_of
from taca_jax.nn.blocks import layer_tokens
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text.clip import CLIP_L
from taca_jax.text.t5 import T5_XXL

FLUX_VAE = VAEConfig(
    channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    groups=32,
    scaling_factor=0.3611,
    shift_factor=0.1159,
)

TEXT_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}

DEV_CALL = CallDefaults(text_length=512, resolution=1024, steps=28, guidance=3.5)
SCHNELL_CALL = CallDefaults(text_length=256, resolution=1024, steps=4, guidance=1.0)
"""As in the original's examples."""


def _defaults_of(config: FluxConfig) -> CallDefaults:
    return DEV_CALL if config.guidance_embed else SCHNELL_CALL


def _schedule_of(config: FluxConfig) -> FlowSchedule:
    """dev's noise levels if guidance is embedded, else schnell's."""
    return FlowSchedule() if config.guidance_embed else FlowSchedule(shift=1.0)


def _attention_pairs(config: FluxConfig, image: int, text: int) -> int:
    return (config.num_double_blocks + config.num_single_blocks) * (image + text) ** 2


FLUX = Family(
    kind=FLUX_KIND,
    title="FLUX.1",
    text_encoders="FLUX.1 has CLIP and T5",
    tiny_autoencoder="TAEF1",
    read_text=read_text,
    published={
        "flux1-dev": Published(
            "flux.1-dev", FLUX_DEV, TEXT_ENCODERS, "black-forest-labs/FLUX.1-dev"
        ),
        "flux1-krea-dev": Published(
            "flux.1-krea-dev", FLUX_KREA, TEXT_ENCODERS, "black-forest-labs/FLUX.1-Krea-dev"
        ),
        "flux1-schnell": Published(
            "flux.1-schnell", FLUX_SCHNELL, TEXT_ENCODERS, "black-forest-labs/FLUX.1-schnell"
        ),
    },
    autoencoder=FLUX_VAE,
    defaults_of=_defaults_of,
    schedule_of=_schedule_of,
    diffusers=DiffusersLayout(
        class_name=diffusers.CLASS,
        config_of=diffusers.config_of,
        settings_of=diffusers.settings_of,
        table_of=lambda _: diffusers.TABLE,
        schedule_of=schedule_of,
    ),
    original=OriginalLayout(
        author="Black Forest Labs",
        prefixes=(bfl.COMFY_PREFIX, ""),
        recognises=bfl.is_flux,
        config_of=bfl.inferred,
        table_of=lambda _: bfl.TABLE,
        text_encoders={
            "text_encoders.clip_l.transformer.": "text_encoder",
            "text_encoders.t5xxl.transformer.": "text_encoder_2",
        },
        unknown_fields={
            "axes_dim": "Rotary channels of (index, row, column), for a single file whose heads "
            "are not 128 wide."
        },
        autoencoder_file="ae.safetensors",
    ),
    lora=LoRANames(
        targets=lora.ATTENTION_TARGETS, dialects=lambda _: lora.DIALECTS, model_of=lora.model_of
    ),
    attention_pairs=_attention_pairs,
    layer_tokens=partial(layer_tokens, joint=re.compile(r"single_blocks\..*")),
    last_products=r"double_blocks\.(img|txt)\.mlp_out|single_blocks\.out",
    embeds_guidance=lambda config: config.guidance_embed,
    with_features=FluxTransformer.with_features,
)
