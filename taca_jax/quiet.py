"""Less said by other people's loggers, for the length of a block."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*loggers: str, below: int) -> Iterator[None]:
    """Lets these loggers say only what is of level `below` or above; their levels come back."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(below)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
