"""Logs of this package and of other libraries, as lines for the user of a command."""

import logging
import os
import sys
import warnings

from taca_jax.parallel.processes import has_tpu_chips

ONLY_ERRORS = ("absl", "orbax", "asyncio", "etils", "filelock", "httpx", "tensorboardX")
"""Loggers of libraries whose warnings are for their developers."""

OTHERWISE = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
"""Without a TPU, libtpu looks for these, writes what it misses to stderr, and then finds no chip
whatever they are."""


class _ToStderr(logging.StreamHandler):
    """Writes to the sys.stderr of the moment, which progress bars replace while they are shown."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def plain_log() -> None:
    """Log messages and Python's warnings become plain lines on stderr, without levels and names of
    modules. Does nothing if the root logger has a handler already."""
    if not logging.root.handlers:
        handler = _ToStderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.root.addHandler(handler)
    for name in ONLY_ERRORS:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.formatwarning = _formatted


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line=None
) -> str:
    del category, filename, lineno, line
    return f"warning: {message}\n"


def no_tpu_no_words() -> None:
    """Keeps libtpu quiet where it is installed and there is no TPU. Changes nothing where there is
    one: its messages are then the user's business."""
    if not has_tpu_chips():
        for name, value in OTHERWISE.items():
            os.environ.setdefault(name, value)
