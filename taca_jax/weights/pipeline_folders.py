"""Pipelines on disk, converted or original: their models, not yet loaded, and their settings."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from taca_jax.autoencoders.tiny_vae_layout import is_taesd
from taca_jax.config.json_text import from_json, to_json
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import family_of, published_models
from taca_jax.formats.atomic import whole_file
from taca_jax.formats.settings import read_settings
from taca_jax.hub.ids import hint, hub_id
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.storage.places import Place
from taca_jax.text.encoders import FOLDERS as TEXT_ENCODERS
from taca_jax.text.encoders import StoredEncoders, TextReading
from taca_jax.weights.folders import (
    CONFIG,
    PIPELINE_FILE,
    check_model,
    load_config,
    load_model,
)
from taca_jax.weights.hub_files import model_files, tokenizer_folders
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.original_pipelines import TOKENIZERS, is_original, open_original
from taca_jax.weights.originals import Original, tiny_vae, vae
from taca_jax.weights.shipped import find_weights, is_here

_LOG = logging.getLogger(__name__)

TRANSFORMER, AUTOENCODER = "transformer", "autoencoder"


@dataclass(frozen=True)
class PipelineSettings:
    """The contents of pipeline.json.

    tokenizer: T5's, as in TextConfig, or None if tokenizers are in the pipeline's folder: that of
      `text_encoder/` in `tokenizer/`, that of `text_encoder_2/` in `tokenizer_2/`, and so on.
    text_length: tokens that T5 reads.
    resolution: pixels per side that the model was trained at.
    steps, guidance: defaults of a call.
    schedule: the sampler's noise levels.
    """

    tokenizer: str | None
    text_length: int
    resolution: int
    steps: int
    guidance: float
    schedule: FlowSchedule


def default_settings(transformer: Any, schedule: FlowSchedule) -> PipelineSettings:
    """The settings of a transformer's config: its family's defaults, tokenizers in the folder."""
    defaults = family_of(transformer).defaults_of(transformer)
    return PipelineSettings(tokenizer=None, **asdict(defaults), schedule=schedule)


def write_settings(folder: Place, settings: PipelineSettings) -> None:
    """Writes a pipeline folder's settings, or replaces them."""
    with whole_file(folder / PIPELINE_FILE) as file:
        file.write_text(to_json(settings))


@dataclass(frozen=True)
class StoredModel:
    """A model that is not loaded: where it is, its config, the function that loads it, and the one
    that checks its files first, as far as their headers show, and raises UserError as loading does.
    """

    where: str
    config: Any
    load: Callable[[LoadOptions], Any]
    check: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class StoredPipeline:
    """A pipeline that is not loaded: its models by folder name, its settings, and the folder of its
    tokenizers."""

    where: Path
    models: Mapping[str, StoredModel]
    settings: PipelineSettings
    tokenizers: Path

    @property
    def transformer(self) -> StoredModel:
        return self.models[TRANSFORMER]

    @property
    def family(self) -> Family:
        """Of the transformer. Raises UserError if that is another kind of model."""
        return family_of(self.transformer.config, self.transformer.where)

    @property
    def reading(self) -> TextReading | None:
        """How prompts are read; None if a text encoder is missing. Raises UserError for text
        encoders that do not fit the transformer."""
        encoders = {name: self.models[name] for name in TEXT_ENCODERS if name in self.models}
        stored = StoredEncoders(str(self.where), encoders, self.settings.text_length)
        return self.family.read_text(self.transformer.config, stored)


def open_pipeline(
    path: str | Place, tokenizers: str | Path | None = None, *, download: bool = True
) -> StoredPipeline:
    """The pipeline at `path`: a converted folder, the name of one that comes with the package, a
    diffusers folder, single files in an original layout (`open_original`), or one of these in a
    bucket (gs://...) or on the hub (its id), which is fetched.

    tokenizers: the folder or hub id of the pipeline whose tokenizers are read; None is this one.
    download: whether the hub may be asked; else only its cache is read.
    Reads configs only. Raises UserError if there is none, or if a part of it is not a known model.
    """
    stored = _open(find_weights(path, download=download))
    if tokenizers is None:
        return stored
    return replace(stored, tokenizers=find_tokenizers(tokenizers))


def find_tokenizers(path: str | Path) -> Path:
    """The folder of a pipeline's tokenizers, from a path or a hub id. Raises UserError if it has
    none."""
    folder = find_weights(path, tokenizer_folders)
    if not any((folder / name).is_dir() for name in TOKENIZERS):
        raise UserError(
            f"tokenizers={path} has no {' nor '.join(TOKENIZERS)}; give a folder that has them, or "
            f"a model of the hub, such as {_an_id()}"
        )
    return folder


def _an_id() -> str:
    return next(model.repo for _, model in published_models().values() if model.repo is not None)


def _open(path: Path) -> StoredPipeline:
    settings_file = path / PIPELINE_FILE
    if settings_file.is_file():
        settings = from_json(PipelineSettings, settings_file.read_text(), str(settings_file))
        load_config(path / TRANSFORMER)  # raises UserError if it is missing
        return converted_pipeline(path, settings)
    if not path.exists():
        _, model = published_models().get(path.name, (None, None))
        of_the_hub = hint(path) if model is None else f"on the hub it is base={model.repo}"
        raise UserError(
            f"{path} is not there; give base= a folder that `taca-convert` made, a diffusers "
            f"folder, or an original's .safetensors file; {of_the_hub}"
        )
    if not is_original(path):
        raise UserError(
            f"{path} is no pipeline folder: it has no {PIPELINE_FILE}; nor is it an original, "
            "which is a diffusers folder with transformer/, or a .safetensors file or a folder "
            "with such files"
        )
    original = open_original(path)
    for note in original.notes:
        _LOG.warning("%s", note)
    return StoredPipeline(
        where=path,
        models={name: _of_original(model) for name, model in original.models.items()},
        settings=default_settings(original.models[TRANSFORMER].config, original.schedule),
        tokenizers=original.tokenizers,
    )


def open_autoencoder(
    path: str | Path, latents: str | None = None, *, download: bool = True
) -> StoredModel:
    """An autoencoder alone: a converted folder, a diffusers folder, a file in the original layout,
    a TAESD-style one (the beginning of its two files' names, their folder, or diffusers'), or the
    hub id of one.

    latents: the family whose scale and shift the latents of a single file have. download: whether
    the hub may be asked. Raises UserError if there is none.
    """
    found = find_weights(path, model_files, download=download)
    if is_taesd(found):
        return _of_original(tiny_vae(found))
    if not found.exists():
        raise UserError(
            f"{path} is not there; give an autoencoder's folder or file, or the beginning of the "
            f"names of a tiny one's two files (DIR/taef1); {hint(path)}"
        )
    if found.is_file():
        return _of_original(vae(found, latents))
    if (found / CONFIG).is_file() and "kind" not in read_settings(found).fields:
        return _of_original(vae(found))
    return stored_model(found)


def _of_original(model: Original) -> StoredModel:
    return StoredModel(model.where, model.config, model.load, model.check)


def converted_pipeline(folder: Path, settings: PipelineSettings) -> StoredPipeline:
    """The pipeline in a converted folder, with the models that are present.

    Raises UserError for a folder that is not of a known model.
    """
    names = [
        name for name in (TRANSFORMER, AUTOENCODER, *TEXT_ENCODERS) if (folder / name).is_dir()
    ]
    return StoredPipeline(
        folder, {name: stored_model(folder / name) for name in names}, settings, tokenizers=folder
    )


def stored_model(folder: Path) -> StoredModel:
    """The model of a model folder. Raises UserError as `load_config` does."""
    return StoredModel(
        str(folder), load_config(folder), partial(load_model, folder), partial(check_model, folder)
    )


def published_pipeline(base: str) -> StoredPipeline:
    """The configs of a released model, by its folder name or hub id; nothing need be there. For
    planning.

    Raises UserError for an unknown name.
    """
    known = published_models()
    repo = base if (found := hub_id(base)) is None else found.repo
    of_hub = [name for name, (_, model) in known.items() if model.repo == repo]
    name = of_hub[0] if of_hub else Path(base).name
    if name not in known:
        raise UserError(
            f"base={base} is not there; plan for {', '.join(known)} needs no folder; of the hub "
            "only what is in the cache is planned with"
        )
    family, model = known[name]
    configs = {
        TRANSFORMER: model.transformer,
        **model.text_encoders,
        AUTOENCODER: family.autoencoder,
    }

    def missing(_: LoadOptions) -> Any:
        raise UserError(f"base={base} is not there")

    return StoredPipeline(
        where=Path(base),
        models={
            part: StoredModel(f"{base}/{part}", each, missing) for part, each in configs.items()
        },
        settings=default_settings(model.transformer, family.schedule_of(model.transformer)),
        tokenizers=Path(base),
    )


def open_or_published(base: str) -> StoredPipeline:
    """The pipeline at `base`, or where nothing is the released model of that name. For planning.

    Raises UserError as `open_pipeline` and `published_pipeline` do.
    """
    return open_pipeline(base, download=False) if is_here(base) else published_pipeline(base)
