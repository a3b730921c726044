"""Where the outputs of the original implementations and the real small assets lie."""

import os
from pathlib import Path

import pytest


def shared_path(relative: str) -> Path:
    """The file or folder `relative` of the shared assets; skips the test where it is absent.

    The root is `$TACA_SHARED`, or `../shared` beside the repository.
    """
    root = Path(os.environ.get("TACA_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    path = root / relative
    if not path.exists():
        pytest.skip(f"needs the shared assets: {relative} is not there (set TACA_SHARED)")
    return path
