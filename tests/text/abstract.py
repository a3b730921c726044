"""Text encoders of which there are configs and shapes alone."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from taca_jax.nn.conditioning import Conditioning
from taca_jax.text.encoders import StoredEncoders, TextEncoder


def stored(**configs: Any) -> StoredEncoders:
    """The encoders of a pipeline by folder, of which T5 reads 7 tokens."""
    models = {
        folder: SimpleNamespace(where=f"the {folder}", config=config)
        for folder, config in configs.items()
    }
    return StoredEncoders("the pipeline", models, text_length=7)


def outputs_of(encoder: TextEncoder, count: int) -> Conditioning:
    """What an abstract encoder would make of two prompts of `count` ids."""
    graph, state = nnx.split(encoder)
    ids = jax.ShapeDtypeStruct((2, count), jnp.int32)
    return jax.eval_shape(lambda state, ids: nnx.merge(graph, state)(ids), state, ids)
