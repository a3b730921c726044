"""Where on this machine things are kept that can be made or fetched again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`~/.cache/taca_jax/NAME`, or where XDG_CACHE_HOME says; it may not be there yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "taca_jax" / name
