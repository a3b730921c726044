"""Other libraries' loggers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(*names: str, below: int) -> Iterator[None]:
    """Within the block these loggers drop messages below the level `below`."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(below)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
