"""The models of a pipeline, converted or original, and what is said beside their weights."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from taca_jax.config.fields import from_json
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import family_of, published_models
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text.encoders import FOLDERS as TEXT_ENCODERS
from taca_jax.text.encoders import StoredEncoders, TextReading
from taca_jax.weights.folders import PIPELINE_FILE, load_config, load_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.original_pipelines import is_original, open_original
from taca_jax.weights.shipped import find_weights

_LOG = logging.getLogger(__name__)

TRANSFORMER, AUTOENCODER = "transformer", "autoencoder"


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
class StoredModel:
    """A model that has not been read: where it is, in words, its config, and what loads it."""

    where: str
    config: Any
    load: Callable[[LoadOptions], Any]


@dataclass(frozen=True)
class StoredPipeline:
    """The models of a pipeline by the name of their folder, none of them read, and the folder of
    its tokenizers."""

    where: Path
    models: Mapping[str, StoredModel]
    settings: PipelineSettings
    tokenizers: Path

    @property
    def transformer(self) -> StoredModel:
        return self.models[TRANSFORMER]

    @property
    def family(self) -> Family:
        """Of the transformer. Raises UserError where it is none."""
        return family_of(self.transformer.config, self.transformer.where)

    @property
    def reading(self) -> TextReading | None:
        """How prompts are read; None where a text encoder is left out. Raises UserError for text
        encoders that do not fit the transformer."""
        encoders = {name: self.models[name] for name in TEXT_ENCODERS if name in self.models}
        stored = StoredEncoders(str(self.where), encoders, self.settings.text_length)
        return self.family.read_text(self.transformer.config, stored)


def open_pipeline(path: str | Path) -> StoredPipeline:
    """The pipeline at `path`: a folder of ours, the name of one that comes with the package, a
    diffusers folder, or an original's single file.

    Reads configs alone. Raises UserError where there is none, or a part of it is no model's.
    """
    path = find_weights(path)
    settings_file = path / PIPELINE_FILE
    if settings_file.is_file():
        settings = from_json(PipelineSettings, settings_file.read_text(), str(settings_file))
        load_config(path / TRANSFORMER)  # says what is wrong where it is not there
        return converted_pipeline(path, settings)
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
    defaults = original.family.defaults_of(original.models[TRANSFORMER].config)
    return StoredPipeline(
        where=path,
        models={
            name: StoredModel(model.where, model.config, model.load)
            for name, model in original.models.items()
        },
        settings=PipelineSettings(tokenizer=None, **asdict(defaults), schedule=original.schedule),
        tokenizers=path if path.is_dir() else path.parent,
    )


def converted_pipeline(folder: Path, settings: PipelineSettings) -> StoredPipeline:
    """The models in a folder of ours, those that are there.

    Raises UserError for a folder of a model that is none.
    """
    names = [
        name for name in (TRANSFORMER, AUTOENCODER, *TEXT_ENCODERS) if (folder / name).is_dir()
    ]
    return StoredPipeline(
        folder, {name: stored_model(folder / name) for name in names}, settings, tokenizers=folder
    )


def stored_model(folder: Path) -> StoredModel:
    """A model folder of ours. Raises UserError as `load_config` does."""
    return StoredModel(str(folder), load_config(folder), partial(load_model, folder))


def published_pipeline(base: str) -> StoredPipeline:
    """A released model by the name of its folder, which need not be here: configs to plan with.

    Raises UserError for a name that is none.
    """
    known = published_models()
    name = Path(base).name
    if name not in known:
        raise UserError(f"base={base} is not there; plan for {', '.join(known)} needs no folder")
    family, model = known[name]
    configs = {
        TRANSFORMER: model.transformer,
        **model.text_encoders,
        AUTOENCODER: family.autoencoder,
    }

    def missing(options: LoadOptions) -> Any:
        del options
        raise UserError(f"base={base} is not there")

    defaults = family.defaults_of(model.transformer)
    return StoredPipeline(
        where=Path(base),
        models={
            part: StoredModel(f"{base}/{part}", each, missing) for part, each in configs.items()
        },
        settings=PipelineSettings(
            tokenizer=None,
            text_length=model.text_length,
            resolution=defaults.resolution,
            steps=defaults.steps,
            guidance=defaults.guidance,
            schedule=family.schedule_of(model.transformer),
        ),
        tokenizers=Path(base),
    )
