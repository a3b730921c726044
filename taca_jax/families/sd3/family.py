"""Stable Diffusion 3 and 3.5 as a family of models."""

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.errors import UserError
from taca_jax.families.base import (
    CallDefaults,
    DiffusersLayout,
    Family,
    LoRANames,
    OriginalLayout,
    Published,
)
from taca_jax.families.sd3 import diffusers, lora, stability
from taca_jax.families.sd3.model import (
    SD3_KIND,
    SD3_MEDIUM,
    SD35_LARGE,
    SD35_MEDIUM,
    SD3Config,
)
from taca_jax.families.sd3.text import read_text
from taca_jax.nn.blocks import layer_tokens
from taca_jax.text.clip import CLIP_BIGG, CLIP_L
from taca_jax.text.t5 import T5_XXL

SD3_VAE = VAEConfig(
    channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    groups=32,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)

TEXT_ENCODERS = {
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_BIGG,
    "text_encoder_3": T5_XXL,
}


def _defaults_of(config: SD3Config) -> CallDefaults:
    """As in the original's examples: 3.5-Medium, 3.5-Large, 3-Medium."""
    if config.num_dual_layers:
        steps, guidance = 40, 4.5
    elif config.qk_norm == "rms":
        steps, guidance = 28, 3.5
    else:
        steps, guidance = 28, 7.0
    return CallDefaults(text_length=256, resolution=1024, steps=steps, guidance=guidance)


def _attention_pairs(config: SD3Config, image: int, text: int) -> int:
    return config.num_layers * (image + text) ** 2 + config.num_dual_layers * image**2


def _check_grid(config: SD3Config, rows: int, columns: int) -> None:
    size = config.position_size
    if max(rows, columns) > size:
        raise UserError(
            f"the picture is {rows} x {columns} tokens; this model has positions for {size} x "
            f"{size} at most: take a smaller one"
        )


SD3 = Family(
    kind=SD3_KIND,
    title="Stable Diffusion 3",
    text_encoders="Stable Diffusion 3 has two CLIPs, and T5 or not",
    tiny_autoencoder="TAESD3",
    read_text=read_text,
    published={
        "sd35-medium": Published(
            "sd3.5-medium",
            SD35_MEDIUM,
            TEXT_ENCODERS,
            "stabilityai/stable-diffusion-3.5-medium",
        ),
        "sd35-large": Published(
            "sd3.5-large", SD35_LARGE, TEXT_ENCODERS, "stabilityai/stable-diffusion-3.5-large"
        ),
        "sd3-medium": Published(
            "sd3-medium",
            SD3_MEDIUM,
            TEXT_ENCODERS,
            "stabilityai/stable-diffusion-3-medium-diffusers",
        ),
    },
    autoencoder=SD3_VAE,
    defaults_of=_defaults_of,
    schedule_of=lambda _: diffusers.SCHEDULE,
    diffusers=DiffusersLayout(
        class_name=diffusers.CLASS,
        config_of=diffusers.config_of,
        settings_of=diffusers.settings_of,
        table_of=diffusers.table_of,
        schedule_of=diffusers.schedule_of,
    ),
    original=OriginalLayout(
        author="Stability AI",
        prefixes=(stability.PREFIX, ""),
        recognises=stability.is_sd3,
        config_of=stability.inferred,
        table_of=stability.table_of,
        text_encoders={
            "text_encoders.clip_l.transformer.": "text_encoder",
            "text_encoders.clip_g.transformer.": "text_encoder_2",
            "text_encoders.t5xxl.transformer.": "text_encoder_3",
        },
        autoencoder_prefix="first_stage_model.",
        written_prefix=stability.PREFIX,
    ),
    lora=LoRANames(
        targets=lora.ATTENTION_TARGETS,
        dialects=lora.dialects,
        model_of=lora.model_of,
        placeholder_stack=lora.PLACEHOLDER_STACK,
    ),
    attention_pairs=_attention_pairs,
    layer_tokens=layer_tokens,
    skippable_layers=lambda config: config.num_layers,
    check_grid=_check_grid,
)
