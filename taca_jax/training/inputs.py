"""The batches of a run."""

from taca_jax.data.cache.reader import Cache, make_cached_loader
from taca_jax.data.loader import Loader, make_loader
from taca_jax.parallel.batches import local_rows
from taca_jax.training.models import InputModels, RunModels
from taca_jax.training.run_data import RunData, check_grids, open_data


def open_loader(
    models: RunModels, inputs: InputModels | Cache, opened: RunData | None = None
) -> Loader:
    """The loader of this process's part of each batch: from the sources of `config.data`, or from
    their cache.

    opened: these sources, if they are open already. Raises UserError as `open_data` does.
    """
    data, parts = models.config.data, models.config.grad_accumulation
    rows = None if models.mesh is None else local_rows(models.mesh, data.batch_size)
    if isinstance(inputs, Cache):
        check_grids(inputs.buckets(), models)
        return make_cached_loader(inputs, data=data, rows=rows, together=parts)
    opened = open_data(models) if opened is None else opened
    return make_loader(
        opened.source,
        data=data,
        tokenize=inputs.tokenizer,
        rows=rows,
        buckets=opened.buckets,
        together=parts,
    )
