"""Commands that end with one line, before any weights are read."""

import sys
from collections.abc import Callable

import numpy as np
import pytest

from taca_jax.formats import tensor_files


def refusal(monkeypatch, main: Callable[[], None], *arguments: str) -> str:
    """The line with which a command ends; fails if it reads more of a tensor than one number."""
    read = tensor_files._read

    def numbers_only(stored, bounds) -> np.ndarray:
        assert np.prod(stored.shape) == 1, f"{stored.name} of {stored.path} was read"
        return read(stored, bounds)

    monkeypatch.setattr(tensor_files, "_read", numbers_only)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    line = end.value.code  # Python itself prints a text and exits with 1
    assert isinstance(line, str)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line
