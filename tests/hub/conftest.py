"""A hub of our own, and a cache in a folder of the test's, in place of the real ones."""

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from taca_jax.hub.fetching import fetch
from tests.hub.stand_in import Hub, serving


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The library's cache, empty, and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    fetch.cache_clear()
    return tmp_path / "hub_cache"


@pytest.fixture
def hub(cache, monkeypatch) -> Iterator[Hub]:
    with serving(Hub()) as made:
        use(made, monkeypatch)
        yield made


def use(hub: Hub, monkeypatch) -> None:
    """What HF_ENDPOINT would do if it were set before the library is imported."""
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)


@pytest.fixture
def offline(monkeypatch):
    """Turns the hub off, within a test: later calls are those of another process."""

    def turn_off() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        fetch.cache_clear()

    return turn_off
