"""The models of a pipeline, converted or original, and what is said beside their weights."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from taca_jax.config.fields import from_json
from taca_jax.errors import UserError
from taca_jax.formats import engine
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.weights.folders import PIPELINE_FILE, load_config, load_model
from taca_jax.weights.original_pipelines import TEXT_ENCODERS, is_original, open_original

_LOG = logging.getLogger(__name__)

TRANSFORMER, AUTOENCODER = "transformer", "autoencoder"

Role = Literal["transformer", "text", "autoencoder"]
ROLES: tuple[Role, ...] = get_args(Role)
"""What parts are for; the text encoders and their tokenizers belong together."""


@dataclass(frozen=True)
class PipelineSettings:
    """What a pipeline folder says beside its weights.

    tokenizer: T5's, as in TextConfig, or None where the pipeline's folder has it, as `tokenizer/`
      beside `text_encoder/`, `tokenizer_2/` beside `text_encoder_2/`, and so on.
    text_length: tokens that T5 reads.
    resolution: pixels per side that the model was trained at.
    steps, guidance: what a call takes that names none.
    schedule: the sampler's noise levels.
    """

    tokenizer: str | None
    text_length: int
    resolution: int
    steps: int
    guidance: float
    schedule: FlowSchedule


@dataclass(frozen=True)
class Part:
    """One model: where it is, in words, its config, and `load`, which takes `load_model`'s options
    and reads it."""

    where: str
    config: Any
    load: Callable[..., Any]


@dataclass(frozen=True)
class Parts:
    """The models of a pipeline by the name of their folder, and the folder of its tokenizers."""

    where: Path
    models: Mapping[str, Part]
    settings: PipelineSettings
    tokenizers: Path


def open_parts(path: Path) -> Parts:
    """The pipeline at `path`: a folder of ours, a diffusers folder, or an original's single file.

    Reads configs alone. Raises UserError where there is none, or a part of it is no model's.
    """
    settings_file = path / PIPELINE_FILE
    if settings_file.is_file():
        settings = from_json(PipelineSettings, settings_file.read_text(), str(settings_file))
        load_config(path / TRANSFORMER)  # says what is wrong where it is not there
        return converted_parts(path, settings)
    if not path.exists():
        raise UserError(
            f"{path} is not there; give base= a folder that `python -m convert` made, a diffusers "
            "folder, or an original's .safetensors file"
        )
    if not is_original(path):
        raise UserError(
            f"{path} is no pipeline folder: it has no {PIPELINE_FILE}; nor is it an original, "
            "which is a diffusers folder with transformer/, or a .safetensors file"
        )
    original = open_original(path)
    for note in original.notes:
        _LOG.warning("%s", note)
    models = {
        name: Part(
            source.tensors.where,
            source.config,
            partial(engine.load, source.table, source.tensors, source.config),
        )
        for name, source in original.sources.items()
    }
    return Parts(
        where=path,
        models=models,
        settings=PipelineSettings(tokenizer=None, **original.call, schedule=original.schedule),
        tokenizers=path if path.is_dir() else path.parent,
    )


def converted_parts(folder: Path, settings: PipelineSettings) -> Parts:
    """The models in a folder of ours, those that are there.

    Raises UserError for a folder of a model that is none.
    """
    names = [
        name for name in (TRANSFORMER, AUTOENCODER, *TEXT_ENCODERS) if (folder / name).is_dir()
    ]
    models = {
        name: Part(
            str(folder / name), load_config(folder / name), partial(load_model, folder / name)
        )
        for name in names
    }
    return Parts(folder, models, settings, tokenizers=folder)
