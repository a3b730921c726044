"""The pictures of a run: their source, opened, and the buckets that batches are taken from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from taca_jax.data.buckets import make_buckets
from taca_jax.data.order import Bucket
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.factory import open_source
from taca_jax.data.sources.mixing import read_example
from taca_jax.data.sources.source import Source, captions_of
from taca_jax.errors import UserError
from taca_jax.parallel.processes import first_before_others
from taca_jax.training.models import RunModels

if TYPE_CHECKING:
    from taca_jax.data.cache.reader import Cache

_LOOKED_AT = 4
"""Pictures of each source that are tried before a run begins."""

From = TypeVar("From", bound="Source | Cache", covariant=True)


@dataclass(frozen=True)
class Examples(Generic[From]):
    """Examples of an opened source, or of a cache, sorted into buckets."""

    source: From
    buckets: Sequence[Bucket]


def open_data(models: RunModels) -> Examples[Source]:
    """The pictures that `config.data` names; no model is loaded, and no picture decoded.

    Raises UserError for sources that cannot be used, and for sizes of pictures that the model
    cannot take.
    """
    config = models.config
    with first_before_others("data that is made on first use"):
        source = open_source(config.data, None if config.features is None else models.multiple)
    least = config.grad_accumulation * config.data.batch_size
    buckets = make_buckets(source, config.data, multiple=models.multiple, least=least)
    check_grids(buckets, models)
    return Examples(source, buckets)


def first_captions(data: Examples[Source]) -> list[str]:
    """Captions of the first picture of each source that can be read."""
    found = []
    for indices in data.buckets[0].parts:
        for index in indices[:_LOOKED_AT].tolist():
            try:
                example = read_example(data.source, index, data.buckets[0].size)
            except BadExampleError:  # the source has counted and logged it
                continue
            found += captions_of(example)
            break
    return found


def check_grids(buckets: Sequence[Bucket], models: RunModels) -> None:
    """Raises UserError for a bucket whose pictures the model cannot take."""
    for bucket in buckets:
        side = models.config.data.resolution
        height, width = bucket.size or (side, side)
        rows, columns = height // models.multiple, width // models.multiple
        try:
            models.family.check_grid(models.transformer, rows, columns)
        except UserError as error:
            what, keys = "pictures", "data.resolution"
            if bucket.size is not None:
                what, keys = "a bucket has pictures", "data.max_aspect or data.resolution"
            raise UserError(f"{what} of {height} x {width} pixels: {error}; lower {keys}") from None
