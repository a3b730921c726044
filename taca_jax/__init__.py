"""Temperature-Adjusted Cross-modal Attention for multimodal diffusion transformers, in JAX.

The public names below are imported when they are first used, so that `import taca_jax` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from taca_jax import families

if TYPE_CHECKING:
    from taca_jax.attention import joint_attention as joint_attention
    from taca_jax.data.config import DataConfig as DataConfig
    from taca_jax.errors import UserError as UserError
    from taca_jax.evaluation.shapes.config import EvalConfig as EvalConfig
    from taca_jax.families import *  # noqa: F403 - a pipeline for each family
    from taca_jax.nn.lora import LoRAConfig as LoRAConfig
    from taca_jax.parallel.mesh import MeshConfig as MeshConfig
    from taca_jax.pipelines.config import GenerateConfig as GenerateConfig
    from taca_jax.pipelines.pipeline import Pipeline as Pipeline
    from taca_jax.taca import TacaConfig as TacaConfig
    from taca_jax.telling.memory import memory as memory
    from taca_jax.text.config import TextConfig as TextConfig
    from taca_jax.training.config import TrainConfig as TrainConfig
    from taca_jax.training.features import FeaturesConfig as FeaturesConfig
    from taca_jax.training.optimizer import OptimizerConfig as OptimizerConfig

_HOMES = {
    "DataConfig": "taca_jax.data.config",
    "EvalConfig": "taca_jax.evaluation.shapes.config",
    "FeaturesConfig": "taca_jax.training.features",
    "GenerateConfig": "taca_jax.pipelines.config",
    "LoRAConfig": "taca_jax.nn.lora",
    "MeshConfig": "taca_jax.parallel.mesh",
    "OptimizerConfig": "taca_jax.training.optimizer",
    "Pipeline": "taca_jax.pipelines.pipeline",
    "TacaConfig": "taca_jax.taca",
    "TextConfig": "taca_jax.text.config",
    "TrainConfig": "taca_jax.training.config",
    "UserError": "taca_jax.errors",
    "joint_attention": "taca_jax.attention",
    "memory": "taca_jax.telling.memory",
    **dict.fromkeys(families.__all__, "taca_jax.families"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
