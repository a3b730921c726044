"""Families of models: everything specific to one family is in its own folder.

`base` defines what a family provides, `registry` lists the families. The classes below are the
families' pipelines, imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taca_jax.families.flux.pipeline import FluxPipeline
    from taca_jax.families.flux2.pipeline import Flux2Pipeline
    from taca_jax.families.sd3.pipeline import SD3Pipeline

__all__ = ["Flux2Pipeline", "FluxPipeline", "SD3Pipeline"]

_HOMES = {
    "Flux2Pipeline": "taca_jax.families.flux2.pipeline",
    "FluxPipeline": "taca_jax.families.flux.pipeline",
    "SD3Pipeline": "taca_jax.families.sd3.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
