"""Families of models, one folder each: all that is true of one family only lives there.

`base` says what a family provides, `registry` which there are. The classes below are each family's
pipeline, imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taca_jax.families.flux.pipeline import FluxPipeline
    from taca_jax.families.sd3.pipeline import SD3Pipeline

__all__ = ["FluxPipeline", "SD3Pipeline"]

_HOMES = {
    "FluxPipeline": "taca_jax.families.flux.pipeline",
    "SD3Pipeline": "taca_jax.families.sd3.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
