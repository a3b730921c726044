"""Temperature-Adjusted Cross-modal Attention for multimodal diffusion transformers, in JAX.

The public names below are imported when they are first used, so that `import taca_jax` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taca_jax.attention import joint_attention
    from taca_jax.errors import UserError
    from taca_jax.families.flux.pipeline import FluxPipeline
    from taca_jax.families.sd3.pipeline import SD3Pipeline
    from taca_jax.taca import TacaConfig

__all__ = ["FluxPipeline", "SD3Pipeline", "TacaConfig", "UserError", "joint_attention"]

_HOMES = {
    "FluxPipeline": "taca_jax.families.flux.pipeline",
    "SD3Pipeline": "taca_jax.families.sd3.pipeline",
    "TacaConfig": "taca_jax.taca",
    "UserError": "taca_jax.errors",
    "joint_attention": "taca_jax.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taca_jax' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
