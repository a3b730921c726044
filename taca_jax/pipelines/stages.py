"""Models that take turns in memory, where there is not room for all of a pipeline's."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from taca_jax.nn.kinds import abstract_model


@dataclass(eq=False)
class Turn:
    """Whose turn it is: of the models that share this, only one is in memory."""

    owner: "Staged | None" = None
    model: Any = None

    def give(self, owner: "Staged") -> Any:
        """The owner's model. Frees that of another, unless a caller still holds it, before it is
        read."""
        if self.owner is not owner:
            self.owner = self.model = None
            gc.collect()  # modules may refer to themselves
            self.model = owner.read()
            self.owner = owner
        return self.model


@dataclass(eq=False)
class Staged:
    """A model that is read when it is its turn, and again each time that it is.

    config: the model's. load: reads it. turn: shared with the pipeline's other models. adapt:
    changes it whenever it has been read, as by attaching a LoRA.
    """

    config: Any
    load: Callable[[], Any]
    turn: Turn = field(repr=False)
    adapt: Callable[[Any], Any] | None = None

    def read(self) -> Any:
        """The model, as it is from now on."""
        model = self.load()
        if self.adapt is not None:
            self.adapt(model)
        return model

    def adapted(self, adapt: Callable[[Any], Any]) -> Any:
        """Adapts the model, now if it is its turn and whenever it has been read; returns what
        `adapt` does. What does not fit the model is refused first, with the model unchanged."""
        result = adapt(abstract_model(self.config, dtype=jnp.float32))
        self.adapt = adapt
        if self.turn.owner is self:
            result = adapt(self.turn.model)
        return result


def present(model: Any) -> Any:
    """A pipeline's model, which is read first if it is not in memory; None where there is none."""
    return model.turn.give(model) if isinstance(model, Staged) else model
