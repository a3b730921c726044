"""Original weights of one model: which layout, which model, and the tensors.

The layout is recognised from the names, and the config from a config.json or from the shapes.
Nothing is read here but headers.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from taca_jax.autoencoders import tiny_vae_layout as tiny_vae_format
from taca_jax.autoencoders import vae_diffusers as vae_format
from taca_jax.autoencoders import vae_original as vae_bfl
from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.autoencoders.vae import FLUX_VAE, SD3_VAE
from taca_jax.errors import UserError
from taca_jax.families.flux import bfl as flux_bfl
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.sd3 import diffusers as sd3_diffusers
from taca_jax.families.sd3 import stability as sd3_native
from taca_jax.formats.float8 import unscaled
from taca_jax.formats.key_table import Table
from taca_jax.formats.settings import read_settings
from taca_jax.formats.tensor_files import TensorFiles, open_tensors, summary, under
from taca_jax.text import clip_layout as clip_format
from taca_jax.text import t5_layout as t5_format
from taca_jax.text.clip import Activation
from taca_jax.weights.folders import CONFIG


@dataclass(frozen=True)
class Source:
    """Original weights of one model: which layout, which model, and the tensors.

    `left_out` are the names of other models' tensors in the same file.
    """

    table: Table
    config: Any
    tensors: TensorFiles
    left_out: tuple[str, ...] = ()


def flux(src: Path, axes_dim: tuple[int, int, int] | None = None) -> Source:
    """A transformer: a folder in diffusers' layout, or a single file in Black Forest Labs' own.

    Their `ae.safetensors` is recognised too. `axes_dim` is asked for where a single file's shapes
    do not tell it.
    """
    if (src / CONFIG).is_file():
        check_not_given(src, axes_dim=axes_dim)
        config = flux_diffusers.config_of(read_settings(src))
        return Source(flux_diffusers.TABLE, config, open_tensors(src))
    tensors = open_tensors(src)
    if vae_bfl.is_autoencoder(tensors):
        return original_vae(tensors, "flux")
    found = _under_any(tensors, (flux_bfl.COMFY_PREFIX, ""))
    if not flux_bfl.is_flux(found):
        raise UserError(
            f"{src} is no FLUX in Black Forest Labs' names: {_names(tensors)}; of diffusers' files "
            f"give the folder with their {CONFIG}"
        )
    config = flux_bfl.inferred(found, axes_dim)
    return Source(flux_bfl.TABLE, config, unscaled(found), others(tensors, found))


def sd3(src: Path) -> Source:
    """A transformer: a folder in diffusers' layout, or a single file of Stability AI's."""
    if (src / CONFIG).is_file():
        config = sd3_diffusers.config_of(read_settings(src))
        return Source(sd3_diffusers.table_of(config), config, open_tensors(src))
    tensors = open_tensors(src)
    found = _under_any(tensors, (sd3_native.PREFIX, ""))
    if not sd3_native.is_sd3(found):
        raise UserError(
            f"{src} is no Stable Diffusion 3 in Stability AI's names: {_names(tensors)}; of "
            f"diffusers' files give the folder with their {CONFIG}"
        )
    config = sd3_native.inferred(found)
    return Source(sd3_native.table_of(config), config, unscaled(found), others(tensors, found))


def t5(src: Path) -> Source:
    """A T5 encoder in transformers' layout: its folder, or the weights alone."""
    tensors = open_tensors(src)
    if (src / CONFIG).is_file():
        return Source(t5_format.TABLE, t5_format.config_of(read_settings(src)), tensors)
    return bare_t5(tensors)


def bare_t5(tensors: TensorFiles) -> Source:
    return Source(t5_format.TABLE, t5_format.inferred(tensors), unscaled(tensors))


def clip(
    src: Path, *, num_heads: int | None = None, activation: Activation | None = None
) -> Source:
    """A CLIP text encoder in transformers' layout: its folder, or the weights alone.

    What the shapes do not tell may be given; a config.json tells it.
    """
    tensors = open_tensors(src)
    if not (src / CONFIG).is_file():
        return bare_clip(tensors, num_heads=num_heads, activation=activation)
    config = clip_format.config_of(read_settings(src), tensors)
    for name, value in {"num_heads": num_heads, "activation": activation}.items():
        if value not in (None, getattr(config, name)):
            raise UserError(
                f"{src / CONFIG} says {name} is {getattr(config, name)}, the command line "
                f"{value}; leave it out there"
            )
    return Source(clip_format.table_of(tensors), config, tensors)


def bare_clip(
    tensors: TensorFiles, *, num_heads: int | None = None, activation: Activation | None = None
) -> Source:
    config = clip_format.inferred(tensors, num_heads=num_heads, activation=activation)
    return Source(clip_format.table_of(tensors), config, unscaled(tensors))


Latents = Literal["flux", "sd3"]
LATENTS = {"flux": FLUX_VAE, "sd3": SD3_VAE}
"""Whose scale and shift of the latents; nothing in an original file says them."""
VAE_PREFIXES: tuple[tuple[str, Latents | None], ...] = (
    ("first_stage_model.", "sd3"),  # within Stability's checkpoints
    ("vae.", None),  # within ComfyUI's
    ("", None),
)


def vae(src: Path, latents: Latents | None = None) -> Source:
    """An autoencoder: a folder in diffusers' layout, or a file in the original's.

    `latents` says whose scale and shift theirs have, which is asked for where nothing tells it.
    """
    if (src / CONFIG).is_file():
        check_not_given(src, latents=latents)
        return Source(vae_format.TABLE, vae_format.config_of(read_settings(src)), open_tensors(src))
    tensors = open_tensors(src)
    for prefix, whose in VAE_PREFIXES:
        found = under(tensors, prefix)
        if vae_bfl.is_autoencoder(found):
            source = original_vae(found, latents or whose)
            return dataclasses.replace(source, left_out=others(tensors, found))
    raise UserError(
        f"{src} is no autoencoder in the original's names: {_names(tensors)}; of diffusers' files "
        f"give the folder with their {CONFIG}"
    )


def original_vae(tensors: TensorFiles, latents: Latents | None) -> Source:
    if latents is None:
        raise UserError(
            f"{tensors.where} does not say how its latents are scaled; give latents, "
            f"one of {', '.join(LATENTS)}"
        )
    config = vae_bfl.inferred(tensors, LATENTS[latents])
    return Source(vae_bfl.table_of(config), config, tensors)


def _under_any(tensors: TensorFiles, prefixes: tuple[str, ...]) -> TensorFiles:
    """The tensors under the first prefix that any has."""
    first = next(p for p in prefixes if any(name.startswith(p) for name in [*tensors.shapes, ""]))
    return under(tensors, first) if first else tensors


def others(tensors: TensorFiles, *found: TensorFiles) -> tuple[str, ...]:
    """The names of a file's tensors that are in none of those that were found in it."""
    used = {place for each in found for place in each.places.values()}
    return tuple(name for name, place in tensors.places.items() if place not in used)


def _names(tensors: TensorFiles) -> str:
    return f"it has {summary(sorted(tensors.shapes), limit=3) or 'no tensors'}"


def check_not_given(src: Path, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{src / CONFIG} tells {name}; leave {name} out")


def tiny_vae(src: Path) -> Source:
    """The two files of a TAESD-style autoencoder; all published ones are of one size."""
    return Source(tiny_vae_format.TABLE, TAEF1, tiny_vae_format.open_taesd(src))


def text_encoder(src: Path) -> Source:
    """A CLIP or a T5 in transformers' layout, whichever the folder's config.json says it is."""
    settings = read_settings(src)
    settings.expect("model_type", "clip_text_model", "t5")
    return t5(src) if settings["model_type"] == "t5" else clip(src)


def transformer(src: Path) -> Source:
    """A FLUX or a Stable Diffusion 3 in diffusers' layout, as the folder's config.json says."""
    settings = read_settings(src)
    settings.expect("_class_name", flux_diffusers.CLASS, sd3_diffusers.CLASS)
    return sd3(src) if settings["_class_name"] == sd3_diffusers.CLASS else flux(src)
