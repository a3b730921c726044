"""Models of the hub as far as headers show them, to check them before they are fetched."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.hub.ids import Select, hub_id
from taca_jax.weights.hub_files import pipeline_files
from taca_jax.weights.shipped import is_here


@contextmanager
def headers_alone(path: str, select: Select = pipeline_files) -> Iterator[str]:
    """Yields a path at which all is that `find_weights(path)` would find, except that of weights
    which would have to be fetched only the headers are there; `path` itself where there are none.

    UserErrors that are raised within name the model by its id.
    """
    found = None if is_here(path) else hub_id(path)
    if found is None:
        yield path
        return
    from taca_jax.hub.fetching import fetch_headers  # slow to import

    with tempfile.TemporaryDirectory() as folder:
        try:
            yield str(fetch_headers(found, select, Path(folder)))
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/", "")) from error
