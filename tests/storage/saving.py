"""Saves the checkpoints of steps 1, 2 and 3 to gs://bucket/run: python -m tests.storage.saving"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from taca_jax.storage.places import place
from taca_jax.training.checkpoints import Checkpoints


@partial(jax.tree_util.register_dataclass, data_fields=("step", "weights"), meta_fields=())
@dataclass
class State:
    """Stands for a TrainState."""

    step: jax.Array
    weights: jax.Array


def state_at(step: int) -> Any:
    return State(jnp.asarray(step), jnp.arange(50_000.0) * step)


def opened() -> Checkpoints:
    return Checkpoints(place("gs://bucket/run"), keep=2, frozen=nnx.State({}))


def main() -> None:
    with opened() as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state_at(step), {"position": step})
            checkpoints.wait()


if __name__ == "__main__":
    main()
