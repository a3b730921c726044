"""The examples of a run: those it trains on, in batches, and those it is measured on."""

from dataclasses import replace

from taca_jax.data.cache.reader import Cache, make_cached_loader
from taca_jax.data.held_out import chosen, hold_out
from taca_jax.data.loader import Loader, make_loader
from taca_jax.data.sources.source import Source
from taca_jax.parallel.batches import local_rows
from taca_jax.training.announcing import say_data
from taca_jax.training.cache_stage import ready_cache
from taca_jax.training.models import InputModels, RunModels
from taca_jax.training.run_data import Examples, check_grids, open_data
from taca_jax.training.signals import Notice

AnyExamples = Examples[Source | Cache]


def open_examples(
    models: RunModels, inputs: InputModels | Cache, opened: Examples[Source] | None = None
) -> tuple[AnyExamples, AnyExamples | None]:
    """What the run trains on, and what is held out of that for validation, if anything is.

    opened: the pictures, if they are open already. Raises UserError as `open_data` does.
    """
    examples = _open(models, inputs, opened)
    say_data(models.config, examples.buckets)
    validation = models.config.validation
    if validation is None or validation.source:
        return examples, None
    training, held = hold_out(examples.buckets, validation.pictures)
    return replace(examples, buckets=training), replace(examples, buckets=held)


def open_validation(
    models: RunModels, inputs: InputModels | Cache, notice: Notice
) -> AnyExamples | None:
    """The examples of `validation.source`, if there is one; encoded first if the run trains from a
    cache, into a cache beside that one. Raises as `open_examples` and `ready_cache` do."""
    config = models.config
    validation = config.validation
    if validation is None or not validation.source:
        return None
    data = replace(config.data, source=validation.source, weights=())
    if isinstance(inputs, Cache):
        beside = config.cache_dir.with_name(f"{config.cache_dir.name}-validation")
        data = replace(data, cache=str(beside))
    only_read = {"validation": None, "sample_every": 0, "features": None, "evaluate": None}
    config = replace(config, data=data, **only_read)
    models = replace(models, config=config)
    found = _open(models, ready_cache(models, notice) if isinstance(inputs, Cache) else inputs)
    return replace(found, buckets=chosen(found.buckets, validation.pictures))


def open_loader(
    models: RunModels, inputs: InputModels | Cache, examples: AnyExamples | None = None
) -> Loader:
    """The loader of this process's part of each batch of `examples`: by default, of all that the
    run trains on. Raises UserError as `open_examples` does."""
    data, parts = models.config.data, models.config.grad_accumulation
    if examples is None:
        examples, _ = open_examples(models, inputs)
    rows = None if models.mesh is None else local_rows(models.mesh, data.batch_size)
    if isinstance(examples.source, Cache):
        cache, buckets = examples.source, examples.buckets
        return make_cached_loader(cache, data=data, rows=rows, buckets=buckets, together=parts)
    assert isinstance(inputs, InputModels)  # whose pictures are not encoded
    return make_loader(
        examples.source,
        data=data,
        tokenize=inputs.tokenizer,
        rows=rows,
        buckets=examples.buckets,
        together=parts,
    )


def _open(
    models: RunModels, inputs: InputModels | Cache, opened: Examples[Source] | None = None
) -> AnyExamples:
    if not isinstance(inputs, Cache):
        return open_data(models) if opened is None else opened
    examples = Examples(inputs, inputs.buckets())
    check_grids(examples.buckets, models)
    return examples
