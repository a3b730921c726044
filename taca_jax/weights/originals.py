"""Original weights of one model: opens files in any known layout.

The layout is recognised by the names of tensors, and the config is read from a config.json or
inferred from shapes. Only headers are read here.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from taca_jax.autoencoders import (
    patched_vae_layout,
    tiny_vae_layout,
    vae_diffusers,
    vae_original,
)
from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import families, family_named
from taca_jax.formats.engine import contiguous, match, stored_dtype
from taca_jax.formats.float8 import cast, unscaled
from taca_jax.formats.key_table import Piece, Table
from taca_jax.formats.settings import Settings, read_settings
from taca_jax.formats.tensor_files import (
    FLOAT8,
    TensorFiles,
    Tensors,
    open_tensors,
    summary,
    under,
)
from taca_jax.nn.kinds import shapes_of
from taca_jax.scorers import blip_layout
from taca_jax.scorers import clip_layout as clip_score_layout
from taca_jax.text import clip_layout, qwen3_layout, t5_layout
from taca_jax.text.clip import Activation
from taca_jax.weights.folders import CONFIG
from taca_jax.weights.loading import Index, LoadOptions, StoredParameters, load_parameters


@dataclass(frozen=True)
class Original:
    """Original weights of one model: the key table of their layout, the config, and the tensors.

    left_out: names of the other tensors in the same file.
    """

    table: Table
    config: Any
    tensors: TensorFiles
    left_out: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Its file or folder, for messages."""
        return self.tensors.where

    def check(self) -> dict[str, tuple[Piece, ...]]:
        """Which tensors each of our parameters is made of; none of them is read.

        Raises UserError that lists every key that is missing, left over or mis-shaped.
        """
        return match(self.table, self.tensors, shapes_of(self.config))

    def load(self, options: LoadOptions) -> Any:
        """Loads the model directly onto its devices, one tensor at a time.

        Raises UserError that lists every key that is missing, left over or mis-shaped.
        """
        pieces = self.check()
        dtypes = {path: stored_dtype(self.tensors, each) for path, each in pieces.items()}

        def read(path: str, part: Index) -> np.ndarray:
            return _part(self.tensors, pieces[path], part)

        return load_parameters(self.config, StoredParameters(dtypes, read), options)


def _part(tensors: Tensors, pieces: Sequence[Piece], part: Index) -> np.ndarray:
    """A part of one of our parameters; of a stack only the requested layers are read."""

    def whole(piece: Piece) -> np.ndarray:
        array = piece.transform.load(tensors.read(piece.key, piece.rows))
        return contiguous(cast(array, jnp.bfloat16) if array.dtype in FLOAT8 else array)

    if pieces[0].layer is None:
        return whole(pieces[0])[part]
    layers, *inside = part
    return np.stack([whole(piece)[tuple(inside)] for piece in pieces[layers]])


def transformer(src: Path, family: Family | None = None, **fields: Any) -> Original:
    """A transformer: a folder in diffusers' layout, or a single file in its authors' layout.

    family: that of the transformer; by default recognised from config.json or the names. If it is
    given, a file may also hold an autoencoder only. fields: config fields that a single file's
    shapes do not determine.
    """
    if (src / CONFIG).is_file():
        check_not_given(src, **fields)
        settings = read_settings(src)
        layout = (family or _family_of_class(settings)).diffusers
        config = layout.config_of(settings)
        return Original(layout.table_of(config), config, open_tensors(src))
    tensors = open_tensors(src)
    if family is not None and vae_original.is_autoencoder(tensors):
        return original_vae(tensors, family)
    found = family_in(tensors, (family,) if family else families())
    if found is None:
        known = ", ".join(each.title for each in families())
        said = f"holds no transformer that is known ({known})"
        if family is not None:
            said = f"is no {family.title} in {family.original.whose} names"
        raise UserError(
            f"{src} {said}: {_names(tensors)}; of diffusers' files give the folder with their "
            f"{CONFIG}"
        )
    family, own = found
    config = family.original.config_of(own, **fields)
    return Original(family.original.table_of(config), config, unscaled(own), others(tensors, own))


def _family_of_class(settings: Settings) -> Family:
    classes = {family.diffusers.class_name: family for family in families()}
    settings.expect("_class_name", *classes)
    return classes[settings["_class_name"]]


def family_in(
    tensors: TensorFiles, among: Sequence[Family] | None = None
) -> tuple[Family, TensorFiles] | None:
    """The family whose transformer is in a single file, and its tensors without prefix, or None."""
    for family in among or families():
        for prefix in family.original.prefixes:
            if family.original.recognises(own := under(tensors, prefix)):
                return family, own
    return None


def t5(src: Path) -> Original:
    """A T5 encoder in transformers' layout: its folder, or a file of weights only."""
    tensors = open_tensors(src)
    if (src / CONFIG).is_file():
        return Original(t5_layout.TABLE, t5_layout.config_of(read_settings(src)), tensors)
    return bare_t5(tensors)


def bare_t5(tensors: TensorFiles) -> Original:
    return Original(t5_layout.TABLE, t5_layout.inferred(tensors), unscaled(tensors))


def clip(
    src: Path, *, num_heads: int | None = None, activation: Activation | None = None
) -> Original:
    """A CLIP text encoder in transformers' layout: its folder, or a file of weights only.

    num_heads, activation: of weights without a config.json, whose shapes do not show them.
    """
    tensors = open_tensors(src)
    if not (src / CONFIG).is_file():
        return bare_clip(tensors, num_heads=num_heads, activation=activation)
    config = clip_layout.config_of(read_settings(src), tensors)
    for name, value in {"num_heads": num_heads, "activation": activation}.items():
        if value not in (None, getattr(config, name)):
            raise UserError(
                f"{src / CONFIG} says {name} is {getattr(config, name)}, the command line "
                f"{value}; leave it out there"
            )
    return Original(clip_layout.table_of(tensors), config, tensors)


def bare_clip(
    tensors: TensorFiles, *, num_heads: int | None = None, activation: Activation | None = None
) -> Original:
    config = clip_layout.inferred(tensors, num_heads=num_heads, activation=activation)
    return Original(clip_layout.table_of(tensors), config, unscaled(tensors))


def qwen3(src: Path) -> Original:
    """A Qwen3 in transformers' layout: its folder, or a file of weights only."""
    tensors = open_tensors(src)
    if not (src / CONFIG).is_file():
        return bare_qwen3(tensors)
    config = qwen3_layout.config_of(read_settings(src))
    return Original(qwen3_layout.table_of(config), config, tensors)


def bare_qwen3(tensors: TensorFiles) -> Original:
    config = qwen3_layout.inferred(tensors)
    return Original(qwen3_layout.table_of(config), config, unscaled(tensors))


def is_encoder(tensors: TensorFiles) -> bool:
    """Whether these are of a text encoder that `bare_encoder` opens."""
    known = (t5_layout.is_t5, qwen3_layout.is_qwen3, clip_layout.is_known)
    return any(each(tensors) for each in known)


def bare_encoder(tensors: TensorFiles) -> Original:
    """A text encoder without a config.json, recognised by the names of its tensors."""
    if t5_layout.is_t5(tensors):
        return bare_t5(tensors)
    return bare_qwen3(tensors) if qwen3_layout.is_qwen3(tensors) else bare_clip(tensors)


ENCODERS: Mapping[str, Callable[[Path], Original]] = {
    "clip_text_model": clip,
    "t5": t5,
    qwen3_layout.MODEL_TYPE: qwen3,
}
"""Functions that open a text encoder's folder, by the type in its config.json."""


def text_encoder(src: Path) -> Original:
    """A text encoder in transformers' layout, according to the folder's config.json."""
    settings = read_settings(src)
    settings.expect("model_type", *ENCODERS)
    return ENCODERS[settings["model_type"]](src)


def autoencoder_prefixes() -> Iterator[tuple[str, Family | None]]:
    """Possible prefixes of an autoencoder in a single file, with the family that each implies."""
    for family in families():
        if family.original.autoencoder_prefix is not None:
            yield family.original.autoencoder_prefix, family
    yield "vae.", None  # in ComfyUI's files
    yield "", None


def vae(src: Path, latents: str | None = None) -> Original:
    """An autoencoder: a folder in diffusers' layout, or a file in the original layout.

    latents: name of the family whose scale and shift the latents have. Raises UserError if the file
    does not determine it and it is not given.
    """
    if (src / CONFIG).is_file():
        check_not_given(src, latents=latents)
        settings = read_settings(src)
        if settings.get("_class_name", None) == patched_vae_layout.CLASS:
            config = patched_vae_layout.config_of(settings)
            return Original(patched_vae_layout.TABLE, config, open_tensors(src))
        config = vae_diffusers.config_of(settings)
        return Original(vae_diffusers.TABLE, config, open_tensors(src))
    tensors = open_tensors(src)
    for prefix, family in autoencoder_prefixes():
        found = under(tensors, prefix)
        if vae_original.is_autoencoder(found):
            source = original_vae(found, family if latents is None else family_named(latents))
            return dataclasses.replace(source, left_out=others(tensors, found))
    raise UserError(
        f"{src} is no autoencoder in the original's names: {_names(tensors)}; of diffusers' files "
        f"give the folder with their {CONFIG}"
    )


def original_vae(tensors: TensorFiles, family: Family | None) -> Original:
    """An autoencoder in the original layout, with the family's scale and shift of latents; FLUX.2's
    has its own."""
    if patched_vae_layout.is_patched(tensors):
        patched = patched_vae_layout.inferred(tensors)
        return Original(patched_vae_layout.original_table_of(patched), patched, tensors)
    if family is None:
        known = ", ".join(each.name for each in families())
        raise UserError(
            f"{tensors.where} does not say how its latents are scaled; give latents, one of {known}"
        )
    config = vae_original.inferred(tensors, family.autoencoder)
    return Original(vae_original.table_of(config), config, tensors)


def tiny_vae(src: Path) -> Original:
    """A TAESD-style autoencoder, in two files or of diffusers; all published ones have the same
    sizes."""
    return Original(tiny_vae_layout.TABLE, TAEF1, tiny_vae_layout.open_taesd(src))


def clip_score(src: Path) -> Original:
    """A whole CLIP, with both towers: a folder in transformers' layout."""
    config = clip_score_layout.config_of(read_settings(src), tensors := open_tensors(src))
    return Original(clip_score_layout.TABLE, config, tensors)


def blip_vqa(src: Path) -> Original:
    """BLIP for questions: a folder in transformers' layout, or a file in its authors' layout."""
    if (src / CONFIG).is_file():
        config = blip_layout.config_of(read_settings(src))
        return Original(blip_layout.TABLE, config, open_tensors(src))
    tensors = open_tensors(src)
    if not blip_layout.is_original(tensors):
        raise UserError(
            f"{src} is no BLIP for questions in its authors' names: {_names(tensors)}; of "
            f"transformers' files give the folder with their {CONFIG}"
        )
    return Original(blip_layout.ORIGINAL_TABLE, blip_layout.inferred(tensors), tensors)


def others(tensors: TensorFiles, *found: TensorFiles) -> tuple[str, ...]:
    """The names of a file's tensors that are in none of `found`."""
    used = {stored for each in found for stored in each.stored.values()}
    return tuple(name for name, stored in tensors.stored.items() if stored not in used)


def _names(tensors: TensorFiles) -> str:
    return f"it has {summary(sorted(tensors.shapes), limit=3) or 'no tensors'}"


def check_not_given(src: Path, **options: Any) -> None:
    """Raises UserError if an option is given that config.json determines."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{src / CONFIG} tells {name}; leave {name} out")
