"""Original weights of a pipeline: a diffusers folder, or single files in one folder.

Only headers and configs are read here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taca_jax.autoencoders import vae_original
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import family_of
from taca_jax.formats.settings import read_settings
from taca_jax.formats.tensor_files import open_tensors, under
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text.encoders import FOLDERS as TEXT_ENCODERS
from taca_jax.weights.folders import CONFIG
from taca_jax.weights.loose_files import LooseFiles, loose_files, root_of
from taca_jax.weights.originals import (
    Original,
    autoencoder_prefixes,
    bare_encoder,
    family_in,
    original_vae,
    others,
    text_encoder,
    transformer,
    vae,
)

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""Folders of the tokenizers, in diffusers and here; each is of the text encoder of its number."""

PIPELINE_PARTS = (
    ("transformer", "transformer", transformer),
    ("vae", "autoencoder", vae),
    *((name, name, text_encoder) for name in TEXT_ENCODERS),
)
"""diffusers' folder, ours, and the function that opens it."""


@dataclass(frozen=True)
class OriginalPipeline:
    """Original weights of a pipeline.

    models: by our folder names. schedule: the sampler's noise levels. tokenizers: the folder that
    theirs are in, if there are any. notes: messages about missing parts and what is used instead.
    """

    models: Mapping[str, Original]
    schedule: FlowSchedule
    tokenizers: Path
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        return family_of(self.models["transformer"].config)


def open_folder(src: Path, family: Family | None = None, **fields: Any) -> OriginalPipeline:
    """A diffusers pipeline folder; all parts are checked, except the tensors themselves.

    family, fields: as for `originals.transformer`. Raises UserError for parts that are damaged or
    of no known model, and for a transformer of another family.
    """
    models = {"transformer": transformer(src / "transformer", family, **fields)}
    for name, made, read in PIPELINE_PARTS[1:]:
        if (src / name).is_dir():
            models[made] = read(src / name)
    config = models["transformer"].config
    family = family_of(config)
    count = max(len(model.text_encoders) for model in family.published.values())
    notes = []
    if absent := [
        name for name in (*TEXT_ENCODERS[:count], *TOKENIZERS[:count]) if not (src / name).is_dir()
    ]:
        notes.append(f"{src} has no {', '.join(absent)}, which prompts are read with")
    if not (src / "vae").is_dir():
        notes.append(f"{src} has no vae, which pictures are made with")
    if (src / "scheduler").is_dir():
        settings = read_settings(src / "scheduler", "scheduler_config.json")
        schedule = family.diffusers.schedule_of(settings)
    else:
        schedule = family.schedule_of(config)
        notes.append(f"{src} has no scheduler; the published noise levels are taken")
    return OriginalPipeline(models, schedule, src, tuple(notes))


def is_diffusers(path: Path) -> bool:
    return (path / "transformer" / CONFIG).is_file()


def is_original(path: Path) -> bool:
    """Whether `path` looks like the original weights of a pipeline."""
    if path.suffix == ".safetensors" or is_diffusers(path):
        return True
    return path.is_dir() and loose_files(path).has_pipeline


def open_original(path: Path, family: Family | None = None, **fields: Any) -> OriginalPipeline:
    """A diffusers pipeline folder; a single file of the authors or of ComfyUI; or a folder with
    such files, which `loose_files` tells apart.

    Parts that a transformer's file does not contain are taken from its folder: the autoencoder
    (such as FLUX's `ae.safetensors`, or diffusers' `vae/`), and text encoders (`text_encoder/`, or
    files such as `clip_l.safetensors`). family, fields: as for `originals.transformer`. Raises
    UserError for a file or folder without a transformer, and as `open_folder` does.
    """
    if is_diffusers(path):
        return open_folder(path, family, **fields)
    root = path if path.is_dir() else root_of(path)
    loose = loose_files(root)
    file = loose.transformer(family) if path.is_dir() else path
    if vae_original.is_autoencoder(open_tensors(file)):
        raise UserError(f"{file} is an autoencoder alone; give the transformer's file beside it")
    parts = parts_in_file(file, family, **fields)
    config = parts["transformer"].config
    family = family_of(config)
    beside = _beside(loose, parts, family)
    notes = [*loose.unread]
    if beside:
        taken = ", ".join(source.where for source in beside.values())
        notes.append(f"{file}: what is not within is taken from beside it: {taken}")
    models = {**parts, **beside}
    return OriginalPipeline(models, family.schedule_of(config), root, tuple(notes))


def _beside(
    loose: LooseFiles, parts: Mapping[str, Original], family: Family
) -> dict[str, Original]:
    """The parts of a pipeline that are not in its transformer's file, from the same folder."""
    root, found = loose.root, {}
    if "autoencoder" not in parts:
        channels = parts["transformer"].config.latent_channels
        if (file := loose.autoencoder(family, channels)) is not None:
            found["autoencoder"] = file
        elif (root / "vae" / CONFIG).is_file():
            found["autoencoder"] = vae(root / "vae")
    for name in TEXT_ENCODERS:
        if name not in parts and (root / name / CONFIG).is_file():
            found[name] = text_encoder(root / name)
    lacking = [name for name in TEXT_ENCODERS if name not in parts and name not in found]
    return found | loose.text_encoders(family, lacking)


def parts_in_file(src: Path, family: Family | None = None, **fields: Any) -> dict[str, Original]:
    """Every model in a single file, by our folder names. Arguments and errors are those of
    `originals.transformer`.
    """
    first = transformer(src, family, **fields)
    tensors = open_tensors(src)
    if (recognised := family_in(tensors)) is None:
        return {"transformer": first}
    family = recognised[0]
    parts, found = {}, []
    for prefix, _ in autoencoder_prefixes():
        if prefix and vae_original.is_autoencoder(autoencoder := under(tensors, prefix)):
            parts["autoencoder"] = original_vae(autoencoder, family)
            found.append(autoencoder)
    for prefix, folder in family.original.text_encoders.items():
        if (encoder := under(tensors, prefix)).shapes:
            parts[folder] = bare_encoder(encoder)
            found.append(encoder)
    rest = set(others(tensors, *found))
    left_out = tuple(name for name in first.left_out if name in rest)
    return {"transformer": dataclasses.replace(first, left_out=left_out), **parts}
