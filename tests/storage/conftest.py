"""A local Cloud Storage with one empty bucket a test."""

from collections.abc import Iterator

import pytest

from taca_jax.storage import places
from taca_jax.weights import bucket_files
from tests.storage.emulator import Emulator, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Emulator]:
    with serving() as emulator:
        yield emulator


@pytest.fixture
def bucket(server, tmp_path, monkeypatch) -> Iterator[Emulator]:
    """The emulator with an empty bucket `bucket`, and no copies of its objects on this machine."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    server.storage.wipe()
    server.add_bucket("bucket")
    server.asked.clear()
    places._reach.cache_clear()
    bucket_files.bucket_weights.cache_clear()
    yield server
    server.seen = server.refused = None
