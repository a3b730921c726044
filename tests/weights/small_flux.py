"""A small FLUX with its encoders and tokenizers: as a diffusers folder, and as single files."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from taca_jax.autoencoders import vae_diffusers, vae_original
from taca_jax.families.flux import bfl
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.flux.family import FLUX_VAE
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.text import clip_layout, t5_layout
from tests import models as tiny
from tests.models import in_layout
from tests.random_models import random_model
from tests.weights.diffusers_folders import write_folder

VAE = tiny.vae_of(FLUX_VAE)
CLIP = replace(tiny.CLIP, projection_dim=None)
T5 = replace(tiny.T5, dim=12)
FLUX = replace(
    tiny.FLUX,
    num_heads=1,
    head_dim=128,
    axes_dim=(16, 56, 56),
    txt_dim=T5.dim,
    pooled_dim=CLIP.dim,
)

PARTS = {
    "transformer": (FLUX, bfl.TABLE, flux_diffusers.TABLE),
    "vae": (VAE, vae_original.table_of(VAE), vae_diffusers.TABLE),
    "text_encoder": (CLIP, clip_layout.TABLE, clip_layout.TABLE),
    "text_encoder_2": (T5, t5_layout.TABLE, t5_layout.TABLE),
}
"""diffusers' folder -> the config, the key table of a single file, and that of diffusers."""

SIDE_BY_SIDE = {
    "transformer": "flux1-dev.safetensors",
    "vae": "ae.safetensors",
    "text_encoder": "clip_l.safetensors",
    "text_encoder_2": "t5xxl_fp16.safetensors",
}
IN_FOLDERS = {
    "transformer": "unet/flux1-dev.safetensors",
    "vae": "vae/ae.safetensors",
    "text_encoder": "clip/clip_l.safetensors",
    "text_encoder_2": "clip/t5xxl_fp16.safetensors",
}
IN_NEWER_FOLDERS = {
    "transformer": "diffusion_models/a.safetensors",
    "vae": "vae/flux/b.safetensors",
    "text_encoder": "text_encoders/c.safetensors",
    "text_encoder_2": "text_encoders/d.safetensors",
}


def know_the_small_clip(monkeypatch) -> None:
    """Shapes do not show a CLIP's heads; those of the released ones are known by their sizes."""
    known = {**clip_layout._KNOWN, (CLIP.dim, CLIP.num_layers): CLIP}
    monkeypatch.setattr(clip_layout, "_KNOWN", known)


@cache
def _model(part: str, dtype: DTypeLike) -> Any:
    return random_model(PARTS[part][0], param_dtype=dtype)


def write_file(file: Path, part: str, dtype: DTypeLike = jnp.float32) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, in_layout(PARTS[part][1], _model(part, dtype)))


def write_files(root: Path, names: Mapping[str, str]) -> Path:
    for part, name in names.items():
        write_file(root / name, part)
    return root


def write_diffusers(root: Path) -> Path:
    """The same weights as a folder of diffusers, with tokenizers and an index."""
    models = {part: (_model(part, jnp.float32), table) for part, (_, _, table) in PARTS.items()}
    return write_folder(root, "FluxPipeline", models)
