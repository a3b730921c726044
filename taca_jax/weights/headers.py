"""Models of the hub and of buckets as far as headers show them, to check them before they are
fetched."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.hub.ids import Select, hub_id
from taca_jax.storage.places import SCHEME, is_bucket_name
from taca_jax.weights.hub_files import pipeline_files
from taca_jax.weights.shipped import is_far


@contextmanager
def headers_alone(path: str, select: Select = pipeline_files) -> Iterator[str]:
    """Yields a path at which all is that `find_weights(path)` would find, except that of weights
    which would have to be fetched only the headers are there; `path` itself where there are none.

    UserErrors that are raised within name the model by its id, or its place in the bucket.
    """
    if not is_far(path, select):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield str(_fetched_headers(path, select, Path(folder)))
        except UserError as error:
            scheme = SCHEME if is_bucket_name(path) else ""
            raise UserError(str(error).replace(f"{folder}/", scheme)) from error


def _fetched_headers(path: str, select: Select, folder: Path) -> Path:
    if is_bucket_name(path):
        from taca_jax.weights.bucket_files import bucket_headers

        return bucket_headers(path, select, folder)
    from taca_jax.hub.fetching import fetch_headers  # slow to import

    found = hub_id(path)
    assert found is not None  # what is far and not in a bucket is on the hub
    return fetch_headers(found, select, folder)
