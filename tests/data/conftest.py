"""Results of scans are stored in a folder of each test's own."""

import pytest


@pytest.fixture(autouse=True)
def stored_scans(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-scans"))
