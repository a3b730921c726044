"""Small trained weights that come with the package; README.md here says how they were made."""

from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.hub.ids import Select, hub_id
from taca_jax.storage.places import Place, is_bucket_name
from taca_jax.weights.hub_files import pipeline_files


def find_weights(
    path: str | Place, select: Select = pipeline_files, *, download: bool = True
) -> Path:
    """Where the weights called `path` are: a path that exists; else, for a plain name, the weights
    shipped under it; else what `select` opens of a model on the hub, fetched if the cache lacks it.
    What `select` opens in a bucket (gs://...) is fetched too.

    `path` itself if there is nothing of these. Raises UserError for an id of the hub (`hub_id`)
    whose files cannot be had; without `download` for what is not in the cache.
    """
    if is_bucket_name(path):
        from taca_jax.weights.bucket_files import bucket_weights

        return bucket_weights(str(path), select, download=download)
    path = Path(path)
    shipped = Path(__file__).parent / path.name
    if path.exists():
        return path
    if path.name == str(path) and shipped.exists():
        return shipped
    if (found := hub_id(str(path))) is not None:
        from taca_jax.hub.fetching import fetch  # slow to import

        return fetch(found, select, download=download)
    return path


def is_here(path: str | Place, select: Select = pipeline_files) -> bool:
    """Whether `find_weights` finds something without asking the hub."""
    try:
        return find_weights(path, select, download=False).exists()
    except UserError:  # a model of the hub that is not in the cache, or not whole
        return False


def is_far(path: str | Place, select: Select = pipeline_files) -> bool:
    """Whether only the hub or a bucket can tell what `path` is, as a thing to open with `select`.

    A bucket is always asked: what was copied from it may have changed there.
    """
    if is_bucket_name(path):
        return True
    return hub_id(str(path)) is not None and not is_here(path, select)
