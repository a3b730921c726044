"""From a configuration to the batches of its run."""

from jax.sharding import Mesh

from taca_jax.config import TrainConfig
from taca_jax.data.buckets import make_buckets
from taca_jax.data.loader import Loader, make_loader
from taca_jax.data.order import Bucket
from taca_jax.data.sources import open_source
from taca_jax.errors import UserError
from taca_jax.models.sd3 import SD3Transformer
from taca_jax.pipelines.base import Pipeline
from taca_jax.processes import first_before_others
from taca_jax.sharding import local_rows


def open_loader(config: TrainConfig, pipeline: Pipeline, mesh: Mesh | None) -> Loader:
    """The loader of this process's part of each batch, over the sources of `config.data`.

    Raises UserError for sources that cannot be used, and for pictures that the model cannot take.
    """
    assert pipeline.tokenizer is not None  # build_pipeline saw to both
    assert pipeline.autoencoder is not None
    with first_before_others("data that is made on first use"):
        source = open_source(config.data)
    multiple = pipeline.autoencoder.config.downscale * pipeline.transformer.config.patch_size
    parts = config.grad_accumulation
    buckets = make_buckets(
        source, config.data, multiple=multiple, least=parts * config.data.batch_size
    )
    _check_positions(buckets, pipeline, multiple)
    return make_loader(
        source,
        data=config.data,
        tokenize=pipeline.tokenizer,
        rows=None if mesh is None else local_rows(mesh, config.data.batch_size),
        buckets=buckets,
        together=parts,
    )


def _check_positions(buckets: list[Bucket], pipeline: Pipeline, multiple: int) -> None:
    transformer = pipeline.transformer
    if not isinstance(transformer, SD3Transformer):
        return
    longest = max((max(bucket.size) for bucket in buckets if bucket.size), default=0)
    most = transformer.config.position_size * multiple
    if longest > most:
        raise UserError(
            f"the longest bucket has {longest} pixels a side; this model has positions for {most}: "
            "lower data.max_aspect or data.resolution"
        )
