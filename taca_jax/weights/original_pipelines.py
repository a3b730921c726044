"""Original weights of a pipeline: a diffusers folder, or a single file and others in its folder.

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

    models: by our folder names. schedule: the sampler's noise levels. notes: messages about missing
    parts and what is used instead.
    """

    models: Mapping[str, Original]
    schedule: FlowSchedule
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
        notes.append(f"{src} has no scheduler; the published noise levels are taken: {schedule}")
    return OriginalPipeline(models, schedule, tuple(notes))


def is_original(path: Path) -> bool:
    """Whether `path` looks like the original weights of a pipeline."""
    return path.suffix == ".safetensors" or (path / "transformer" / CONFIG).is_file()


def open_original(path: Path) -> OriginalPipeline:
    """A diffusers pipeline folder, or a single file of the authors or of ComfyUI.

    Parts that a file does not contain are taken from its folder if they are there: the autoencoder
    (such as FLUX's `ae.safetensors`, or diffusers' `vae/`), and text encoders (`text_encoder/`,
    ...). Raises UserError for a file without a transformer, and as `open_folder` does.
    """
    if path.is_dir():
        return open_folder(path)
    if vae_original.is_autoencoder(open_tensors(path)):
        raise UserError(f"{path} is an autoencoder alone; give the transformer's file beside it")
    parts = parts_in_file(path)
    config = parts["transformer"].config
    family = family_of(config)
    beside = _beside(path.parent, parts, family)
    taken = ", ".join(source.where for source in beside.values())
    notes = (f"{path}: what is not within is taken from beside it: {taken}",) if beside else ()
    return OriginalPipeline({**parts, **beside}, family.schedule_of(config), notes)


def _beside(folder: Path, parts: Mapping[str, Original], family: Family) -> dict[str, Original]:
    found = {}
    if "autoencoder" not in parts:
        file = family.original.autoencoder_file
        if file is not None and (folder / file).is_file():
            found["autoencoder"] = vae(folder / file, family.name)
        elif (folder / "vae" / CONFIG).is_file():
            found["autoencoder"] = vae(folder / "vae")
    for name in TEXT_ENCODERS:
        if name not in parts and (folder / name / CONFIG).is_file():
            found[name] = text_encoder(folder / name)
    return found


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
