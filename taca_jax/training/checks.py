"""What is wrong with a run, as far as configs, headers of files and the names of pictures show it.

What this machine shows is looked at first, then headers of models that are on the hub or in a
bucket; no weights are read, nor fetched before all is found right, so that a mistake is reported
within seconds, however large the base is.
Each check is the one that would fail later. Nothing here needs what takes seconds to import.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import jax

from taca_jax.data.config import DataConfig
from taca_jax.data.held_out import hold_out
from taca_jax.data.sources.factory import check_there
from taca_jax.data.sources.source import Source
from taca_jax.evaluation.shapes.base import check_pixels
from taca_jax.formats.atomic import check_writable
from taca_jax.nn.lora import adapted_paths
from taca_jax.parallel.processes import do_not_wait_at_exit, is_first, join_processes
from taca_jax.pipelines.text import find_tokenizers, load_tokenizers
from taca_jax.storage.places import reach
from taca_jax.training.config import TrainConfig
from taca_jax.training.lora_start import check_start, open_start
from taca_jax.training.models import PIXELS, RunModels, open_models
from taca_jax.training.record import check_record
from taca_jax.training.run_data import Examples, first_captions, open_data
from taca_jax.training.sample_options import check_samples
from taca_jax.training.wandb_log import check_wandb
from taca_jax.weights.headers import headers_alone
from taca_jax.weights.hub_files import lora_files, model_files
from taca_jax.weights.lora_files import kernel_shapes
from taca_jax.weights.shipped import find_weights


@dataclass(frozen=True)
class CheckedRun:
    """A run that can begin: its models, on their mesh and not loaded, and its pictures; None where
    a cache has all of them."""

    models: RunModels
    data: Examples[Source] | None


def check_run(config: TrainConfig) -> CheckedRun:
    """Opens everything that a run reads, and loads none of it.

    If there are several processes, all call this. Raises UserError for all that needs no weights to
    be found: a folder of the run that is another's or cannot be written, a base, LoRA, cache,
    evaluation or mesh that does not fit, pictures or captions that are missing, prompts that cannot
    be read.
    """
    join_processes()
    try:
        return _checked(config)
    except BaseException:
        do_not_wait_at_exit()
        raise


def _checked(config: TrainConfig) -> CheckedRun:
    check_wandb(config)
    reach(config.run_dir)
    begins = check_record(config) == 0
    if is_first():
        check_writable(config.run_dir)
    if config.data.encode != "cache":  # a complete cache needs no pictures
        for data in (config.data, *_validated(config)):
            check_there(data)
    with ExitStack() as folders:
        seen = _by_headers(config, folders)
        # What a LoRA to start from has of ranks shows only in its values.
        known = seen.lora == config.lora
        models = open_models(seen, begins=begins and known)
        if begins and not known:
            check_start(seen.lora, models.family, models.transformer)
        checked = _checked_models(models)
    return checked if seen == config else _fetched(config, checked, begins=begins)


def _by_headers(config: TrainConfig, folders: ExitStack) -> TrainConfig:
    """The same, with weights that would have to be fetched seen by their headers; what of them is
    on this machine is in `folders`."""
    lora = config.lora
    if config.base is not None:
        config = replace(config, base=folders.enter_context(headers_alone(config.base)))
    if config.autoencoder != PIXELS:
        given = folders.enter_context(headers_alone(config.autoencoder, model_files))
        config = replace(config, autoencoder=given)
    if lora is not None and lora.init is not None:
        init = folders.enter_context(headers_alone(lora.init, lora_files))
        config = replace(config, lora=replace(lora, init=init))
    return config


def _fetched(config: TrainConfig, checked: CheckedRun, *, begins: bool) -> CheckedRun:
    """The same run, with weights that are fetched, what is small first."""
    models = checked.models
    if begins:
        open_start(config.lora, models.family, models.transformer)
    if config.autoencoder != PIXELS:
        find_weights(config.autoencoder, model_files)
    return replace(checked, models=open_models(config, begins=begins).on_mesh(models.mesh))


def _checked_models(models: RunModels) -> CheckedRun:
    config = models.config
    for model in models.stored.models.values():
        model.check()
    find_tokenizers(models.stored, models.reading)
    _check_targets(models)
    check_samples(models)
    if config.evaluate is not None:
        check_pixels(models.stored.settings.resolution, "set evaluate=none")
    data = _checked_data(models)
    mesh = models.choose_mesh(jax.devices())
    models = models.on_mesh(None if mesh.size == 1 else mesh)
    tokenizer = load_tokenizers(models.stored, models.reading)
    if config.sample_every:
        tokenizer(config.sample_prompts)
    if data is not None:
        tokenizer(first_captions(data))
    return CheckedRun(models, data)


def _check_targets(models: RunModels) -> None:
    """Raises UserError for a target of the LoRA that no layer matches."""
    lora = models.config.lora
    if lora is not None:
        targets = models.family.lora.targets if lora.targets is None else lora.targets
        adapted_paths(kernel_shapes(models.transformer), targets)


def _validated(config: TrainConfig) -> list[DataConfig]:
    """The pictures that the run is only measured on, if they are in a place of their own."""
    validation = config.validation
    if validation is None or not validation.source:
        return []
    return [replace(config.data, source=validation.source, weights=())]


def _checked_data(models: RunModels) -> Examples[Source] | None:
    config = models.config
    if config.data.encode != "cache":
        for data in _validated(config):
            open_data(replace(models, config=replace(config, data=data, features=None)))
        opened = open_data(models)
        if config.validation is not None and not config.validation.source:
            hold_out(opened.buckets, config.validation.pictures)  # which may be too many
        return opened
    from taca_jax.training.cache_stage import check_cache  # slow to import, and needed only here

    return check_cache(models)
