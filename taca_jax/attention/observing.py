"""Observing the joint attentions of a model while it runs, without the model's taking part.

`observed(look, call)` makes every `joint_attention` within `call` show its queries, keys and sums
to `look`. Whoever runs blocks in a loop (`nn.stacking`) runs each iteration as a `layer`, and
`record`s what the loop returns, because values leave a traced loop by no other way. Where nobody
observes, compiled programs are as they would be without this module.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from taca_jax.attention.log_sums import LogSums

T = TypeVar("T")


class Attention(NamedTuple):
    """One joint attention, of `text_len` text tokens and then image tokens.

    q, k: as they are multiplied, thus after their norm and rotation. gamma: TACA's temperature.
    sums: of its softmax, with gamma.
    """

    q: Float[Array, "b s h d"]
    k: Float[Array, "b s h d"]
    text_len: int
    gamma: Float[Array, " b"]
    sums: LogSums


Look = Callable[[Attention], Any]
"""What is kept of an attention: a pytree of arrays, of the same shapes for all layers."""


@dataclass
class _Observer:
    """A look, and what it has seen: pytrees whose arrays have a leading axis of layers."""

    look: Look
    seen: list[Any] = field(default_factory=list)


_OBSERVER: ContextVar[_Observer | None] = ContextVar("observer of attention", default=None)


def observed(look: Look, call: Callable[[], T]) -> tuple[T, Any]:
    """`call()`, and what `look` returned of each joint attention in it, stacked: `[layers, ...]`.

    Layers are in the order in which they run; attentions without text are left out. Their outputs
    are those of an unobserved call up to rounding, and have no gradient.

    A function that is compiled has to call this, not be called by it: JAX would run the unobserved
    program of a jitted `call` that it has traced before. Nor can `call` hide an attention in other
    control flow than a stack of blocks, such as skip-layer guidance.
    """
    observer = _Observer(look)
    token = _OBSERVER.set(observer)
    try:
        result = call()
    finally:
        _OBSERVER.reset(token)
    return result, _concatenated(observer.seen)


def layer(call: Callable[[], T]) -> tuple[T, Any]:
    """One iteration of a loop: `call()`, and what was seen in it, which the loop has to return.

    That is None where nobody observes.
    """
    observer = _OBSERVER.get()
    return (call(), None) if observer is None else observed(observer.look, call)


def record(seen: Any) -> None:
    """Adds what a loop over layers returned: arrays `[iterations, layers of one, ...]`, or None."""
    observer = _OBSERVER.get()
    if observer is not None and seen is not None:
        observer.seen.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen))


def is_observed() -> bool:
    """Whether the surrounding call is observed."""
    return _OBSERVER.get() is not None


def see(attention: Attention) -> None:
    """Shows one attention to the observer of the surrounding call, of which there must be one."""
    observer = _OBSERVER.get()
    assert observer is not None
    observer.seen.append(jax.tree.map(lambda x: x[None], observer.look(attention)))


def _concatenated(seen: list[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen) if seen else None
