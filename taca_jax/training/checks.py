"""What is wrong with a run, as far as configs, headers of files and the names of pictures show it.

No weights are read here, nor fetched from the hub as part of a base, so that a mistake is reported
within seconds, however large that is.
Each check is the one that would fail later. Nothing here needs what takes seconds to import.
"""

from dataclasses import dataclass, replace

import jax

from taca_jax.data.sources.source import Source
from taca_jax.evaluation.shapes.base import check_pixels
from taca_jax.formats.atomic import check_writable
from taca_jax.nn.lora import adapted_paths
from taca_jax.parallel.choice import choose_mesh
from taca_jax.parallel.processes import do_not_wait_at_exit, is_first, join_processes
from taca_jax.pipelines.text import find_tokenizers, load_tokenizers
from taca_jax.storage.places import reach
from taca_jax.training.config import TrainConfig
from taca_jax.training.models import RunModels, open_models
from taca_jax.training.record import check_record
from taca_jax.training.run_data import Examples, first_captions, open_data
from taca_jax.training.sample_options import check_samples
from taca_jax.training.wandb_log import check_wandb
from taca_jax.weights.hub_headers import headers_alone
from taca_jax.weights.lora_files import kernel_shapes


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
    if config.base is None:
        return _checked_models(open_models(config, begins=begins))
    with headers_alone(config.base) as base:
        checked = _checked_models(open_models(replace(config, base=base), begins=begins))
    if base == config.base:
        return checked
    fetched = open_models(config, begins=begins).on_mesh(checked.models.mesh)
    return replace(checked, models=fetched)


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
    mesh = choose_mesh(config.mesh, jax.devices(), models.parameter_bytes)
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


def _checked_data(models: RunModels) -> Examples[Source] | None:
    if models.config.data.encode != "cache":
        return open_data(models)
    from taca_jax.training.cache_stage import check_cache  # slow to import, and needed only here

    return check_cache(models)
