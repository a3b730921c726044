"""The examples of a run: those it trains on, in batches, and those it is measured on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from taca_jax.data.buckets import make_buckets
from taca_jax.data.cache.reader import Cache, make_cached_loader
from taca_jax.data.held_out import chosen, hold_out
from taca_jax.data.loader import Loader, make_loader
from taca_jax.data.order import Bucket
from taca_jax.data.sources.factory import open_source
from taca_jax.data.sources.source import Source
from taca_jax.errors import UserError
from taca_jax.parallel.batches import local_rows
from taca_jax.parallel.processes import first_before_others
from taca_jax.training.cache_stage import ready_cache
from taca_jax.training.models import InputModels, RunModels
from taca_jax.training.signals import Notice


@dataclass(frozen=True)
class Examples:
    """Examples of a source, or of a cache, sorted into buckets."""

    source: Source | Cache
    buckets: list[Bucket]


def open_examples(
    models: RunModels, inputs: InputModels | Cache
) -> tuple[Examples, Examples | None]:
    """What the run trains on, and what is held out of that for validation, if anything is.

    Raises UserError for sources that cannot be used, and for sizes of pictures that the model
    cannot take.
    """
    examples = _open(models, inputs)
    validation = models.config.validation
    if validation is None or validation.source:
        return examples, None
    training, held = hold_out(examples.buckets, validation.pictures)
    return replace(examples, buckets=training), replace(examples, buckets=held)


def open_validation(
    models: RunModels, inputs: InputModels | Cache, notice: Notice
) -> Examples | None:
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
    models: RunModels, inputs: InputModels | Cache, examples: Examples | None = None
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


def _open(models: RunModels, inputs: InputModels | Cache) -> Examples:
    data, parts = models.config.data, models.config.grad_accumulation
    if isinstance(inputs, Cache):
        examples = Examples(inputs, inputs.buckets())
    else:
        with first_before_others("data that is made on first use"):
            source = open_source(data, None if models.config.features is None else models.multiple)
        least = parts * data.batch_size
        buckets = make_buckets(source, data, multiple=models.multiple, least=least)
        examples = Examples(source, buckets)
    _check_grids(examples.buckets, models)
    return examples


def _check_grids(buckets: Sequence[Bucket], models: RunModels) -> None:
    for bucket in buckets:
        if bucket.size is None:
            continue
        rows, columns = (side // models.multiple for side in bucket.size)
        try:
            models.family.check_grid(models.transformer, rows, columns)
        except UserError as error:
            height, width = bucket.size
            raise UserError(
                f"a bucket has pictures of {height} x {width} pixels: {error}; lower "
                "data.max_aspect or data.resolution"
            ) from None
