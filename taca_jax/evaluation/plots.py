"""Matplotlib, which only figures need and the package does not require."""

import importlib.util

from taca_jax.errors import UserError


def need_matplotlib() -> None:
    """Raises UserError where Matplotlib is not installed; for the start of what ends in figures."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figures need Matplotlib: pip install matplotlib (the extra plots)")
