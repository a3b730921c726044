"""A small Stable Diffusion 3.5 with its three text encoders, as a folder of diffusers."""

from dataclasses import replace
from pathlib import Path

from taca_jax.autoencoders import vae_diffusers
from taca_jax.families.sd3 import diffusers as sd3_diffusers
from taca_jax.families.sd3.family import SD3_VAE
from taca_jax.text import clip_layout, t5_layout
from tests import models as tiny
from tests.random_models import random_model
from tests.weights.diffusers_folders import write_folder

SD3 = tiny.SD3
CLIP = replace(tiny.CLIP, dim=SD3.txt_dim // 2 - 2, projection_dim=SD3.pooled_dim // 2)
PARTS = {
    "transformer": (SD3, sd3_diffusers.table_of(SD3)),
    "vae": (tiny.vae_of(SD3_VAE), vae_diffusers.TABLE),
    "text_encoder": (CLIP, clip_layout.TABLE),
    "text_encoder_2": (replace(CLIP, num_layers=3), clip_layout.TABLE),
    "text_encoder_3": (replace(tiny.T5, dim=SD3.txt_dim), t5_layout.TABLE),
}


def write_diffusers(root: Path) -> Path:
    parts = {name: (random_model(config), table) for name, (config, table) in PARTS.items()}
    return write_folder(root, "StableDiffusion3Pipeline", parts)
