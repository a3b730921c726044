"""The batches of a run."""

from collections.abc import Sequence

from taca_jax.data.buckets import make_buckets
from taca_jax.data.cache.reader import Cache, make_cached_loader
from taca_jax.data.loader import Loader, make_loader
from taca_jax.data.order import Bucket
from taca_jax.data.sources.factory import open_source
from taca_jax.errors import UserError
from taca_jax.parallel.batches import local_rows
from taca_jax.parallel.processes import first_before_others
from taca_jax.training.announcing import say_data
from taca_jax.training.models import InputModels, RunModels


def open_loader(models: RunModels, inputs: InputModels | Cache) -> Loader:
    """The loader of this process's part of each batch: from the sources of `config.data`, or from
    their cache.

    Raises UserError for sources that cannot be used, and for sizes of pictures that the model
    cannot take.
    """
    data, parts = models.config.data, models.config.grad_accumulation
    rows = None if models.mesh is None else local_rows(models.mesh, data.batch_size)
    if isinstance(inputs, Cache):
        _check_grids(inputs.buckets(), models)
        say_data(models.config, inputs.buckets())
        return make_cached_loader(inputs, data=data, rows=rows, together=parts)
    with first_before_others("data that is made on first use"):
        source = open_source(data, None if models.config.features is None else models.multiple)
    least = parts * data.batch_size
    buckets = make_buckets(source, data, multiple=models.multiple, least=least)
    _check_grids(buckets, models)
    say_data(models.config, buckets)
    return make_loader(
        source,
        data=data,
        tokenize=inputs.tokenizer,
        rows=rows,
        buckets=buckets,
        together=parts,
    )


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
