"""A small FLUX with its encoders and tokenizers: as a diffusers folder, and as single files."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from taca_jax.autoencoders import vae_diffusers, vae_original
from taca_jax.families.flux import bfl
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.flux.family import FLUX_VAE
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.text import clip_layout, t5_layout
from tests import models as tiny
from tests.models import in_layout
from tests.random_models import random_model

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

WORDS = ("<pad>", "</s>", "a", "red", "blue", "circle", "square")


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


def write_tokenizers(root: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "</s>"))
    tokenizer.pre_tokenizer = Whitespace()
    for name in ("tokenizer", "tokenizer_2"):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
        )
        fast.save_pretrained(str(root / name))


def write_diffusers(root: Path) -> Path:
    """The same weights as a folder of diffusers, with tokenizers and an index."""
    for part, (config, _, table) in PARTS.items():
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        (root / part).mkdir(parents=True)
        tensors = in_layout(table, _model(part, jnp.float32))
        write_tensors(root / part / f"{name}.safetensors", tensors)
        (root / part / "config.json").write_text(json.dumps(_settings(config)))
    index = {part: ["library", "Class"] for part in (*PARTS, "tokenizer", "tokenizer_2")}
    (root / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **index}))
    write_tokenizers(root)
    return root


def _settings(config: Any) -> dict[str, Any]:
    if config is FLUX:
        return flux_diffusers.settings_of(FLUX)
    if config is VAE:
        return vae_diffusers.settings_of(VAE)
    if config is CLIP:
        return {
            "model_type": "clip_text_model",
            "vocab_size": CLIP.vocab_size,
            "max_position_embeddings": CLIP.max_tokens,
            "hidden_size": CLIP.dim,
            "intermediate_size": CLIP.ff_dim,
            "num_attention_heads": CLIP.num_heads,
            "num_hidden_layers": CLIP.num_layers,
            "hidden_act": CLIP.activation,
            "eos_token_id": 2,  # as in the released configs
        }
    return {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": T5.vocab_size,
        "d_model": T5.dim,
        "d_ff": T5.ff_dim,
        "num_heads": T5.num_heads,
        "d_kv": T5.head_dim,
        "num_layers": T5.num_layers,
        "relative_attention_num_buckets": T5.relative_buckets,
        "relative_attention_max_distance": T5.relative_max_distance,
    }
