"""From a configuration to the batches of its run."""

from jax.sharding import Mesh

from taca_jax.data.buckets import make_buckets
from taca_jax.data.cache import Cache, make_cached_loader
from taca_jax.data.loader import Loader, make_loader
from taca_jax.data.order import Bucket
from taca_jax.data.sources.opening import open_source
from taca_jax.errors import UserError
from taca_jax.families.sd3.model import SD3Transformer
from taca_jax.parallel.batches import local_rows
from taca_jax.parallel.processes import first_before_others
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.training.config import TrainConfig


def open_loader(
    config: TrainConfig, pipeline: Pipeline, mesh: Mesh | None, cache: Cache | None = None
) -> Loader:
    """The loader of this process's part of each batch: over the sources of `config.data`, or over
    what `cache` has made of them.

    Raises UserError for sources that cannot be used, and for pictures that the model cannot take.
    """
    parts = config.grad_accumulation
    rows = None if mesh is None else local_rows(mesh, config.data.batch_size)
    if cache is not None:
        _check_positions(cache.buckets(), pipeline, cache.manifest.downscale)
        return make_cached_loader(cache, data=config.data, rows=rows, together=parts)
    assert pipeline.tokenizer is not None  # build_pipeline saw to both
    assert pipeline.autoencoder is not None
    with first_before_others("data that is made on first use"):
        source = open_source(config.data)
    downscale = pipeline.autoencoder.config.downscale
    buckets = make_buckets(
        source,
        config.data,
        multiple=downscale * pipeline.transformer.config.patch_size,
        least=parts * config.data.batch_size,
    )
    _check_positions(buckets, pipeline, downscale)
    return make_loader(
        source,
        data=config.data,
        tokenize=pipeline.tokenizer,
        rows=rows,
        buckets=buckets,
        together=parts,
    )


def _check_positions(buckets: list[Bucket], pipeline: Pipeline, downscale: int) -> None:
    transformer = pipeline.transformer
    if not isinstance(transformer, SD3Transformer):
        return
    longest = max((max(bucket.size) for bucket in buckets if bucket.size), default=0)
    most = transformer.config.position_size * transformer.config.patch_size * downscale
    if longest > most:
        raise UserError(
            f"the longest bucket has {longest} pixels a side; this model has positions for {most}: "
            "lower data.max_aspect or data.resolution"
        )
