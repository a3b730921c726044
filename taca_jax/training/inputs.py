"""From a configuration to the batches of its run."""

from collections.abc import Sequence

from jax.sharding import Mesh

from taca_jax.data.buckets import make_buckets
from taca_jax.data.cache import Cache, make_cached_loader
from taca_jax.data.loader import Loader, make_loader
from taca_jax.data.order import Bucket
from taca_jax.data.sources.factory import open_source
from taca_jax.errors import UserError
from taca_jax.parallel.batches import local_rows
from taca_jax.parallel.processes import first_before_others
from taca_jax.training.config import TrainConfig
from taca_jax.training.models import InputModels, RunModels


def open_loader(
    config: TrainConfig, models: RunModels, inputs: InputModels | Cache, mesh: Mesh | None
) -> Loader:
    """The loader of this process's part of each batch: over the sources of `config.data`, or over
    what a cache has made of them.

    Raises UserError for sources that cannot be used, and for pictures that the model cannot take.
    """
    parts = config.grad_accumulation
    rows = None if mesh is None else local_rows(mesh, config.data.batch_size)
    if isinstance(inputs, Cache):
        _check_grids(inputs.buckets(), models)
        return make_cached_loader(inputs, data=config.data, rows=rows, together=parts)
    with first_before_others("data that is made on first use"):
        source = open_source(config.data)
    buckets = make_buckets(
        source, config.data, multiple=models.multiple, least=parts * config.data.batch_size
    )
    _check_grids(buckets, models)
    return make_loader(
        source,
        data=config.data,
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
