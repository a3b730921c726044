"""The one entry point to TACA joint attention: checks arguments, chooses what runs."""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from taca_jax.attention import chunked, observing, pallas_tpu, reference, split
from taca_jax.attention.log_sums import LogSums
from taca_jax.attention.sharded import is_shared, local_shape, over_mesh

LOGGER = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "split", "chunked", "pallas", "pallas_interpret"]

Attend = Callable[..., jax.Array]
"""`(q, k, v, *, text_len, gamma)` -> the output."""

_IMPLEMENTATIONS: dict[str, Attend] = {
    "reference": reference.joint_attention,
    "split": split.joint_attention,
    "chunked": chunked.joint_attention,
    "pallas": over_mesh(pallas_tpu.joint_attention),
    "pallas_interpret": over_mesh(partial(pallas_tpu.joint_attention, interpret=True)),
}

Gamma = (
    float
    | np.number
    | Float[Array, ""]
    | Float[Array, " b"]
    | Float[np.ndarray, ""]
    | Float[np.ndarray, " b"]
)
"""A temperature for all samples, or one for each."""


def joint_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Gamma | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b s h d"]:
    """Attention over text and image tokens; gamma multiplies logits of image queries and text keys.

    The first `text_len` tokens (0 to s) are text. `gamma` is the temperature: a number or an array
    of shape `[]`, or of shape `[b]`, one per sample; it may be traced. None is 1, with the same
    result to the last bit. The softmax is in float32; the result has q's dtype.

    `auto` takes `pallas` on TPUs (over the mesh that is set, see `sharded`), `split` (cuDNN) on
    GPUs and `chunked` elsewhere. On a TPU whose VMEM is too small for the kernel's forward pass,
    or, where gradients are taken, for its backward pass, it takes `chunked` and logs a warning.
    `pallas_interpret` runs the TPU kernel anywhere, slowly. Within `observing.observed` attentions
    with text are shown to the observer, and have no gradient.

    Raises ValueError for shapes that do not fit, a text_len outside 0..s, a gamma of another shape,
    an unknown implementation, or one that cannot run here.
    """
    if observing.is_observed() and text_len > 0:
        return _observed(q, k, v, text_len, gamma, implementation)
    gamma = _checked(q, k, v, text_len, gamma)
    chosen = _chosen(implementation)
    attend = _IMPLEMENTATIONS[chosen]
    if implementation == "auto" and chosen == "pallas":
        attend = _as_vmem_allows(q, text_len)
    return attend(q, k, v, text_len=text_len, gamma=gamma)


def joint_attention_with_log_sums(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Gamma | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "b s h d"], LogSums]:
    """`joint_attention`, and how much of its attention each query pays to text; for analysis.

    The TPU kernel computes both in one pass on one device; over a mesh, and with any other
    implementation, a second pass takes the sums in chunks. Neither has a gradient. Raises as
    `joint_attention` does.
    """
    gamma = _checked(q, k, v, text_len, gamma)
    chosen = _chosen(implementation)
    if implementation == "auto" and chosen == "pallas":
        lack = _lack_of_room("forward", q, local_shape(q.shape), text_len)
        if lack is not None:
            _warn_of_chunks(lack)
            chosen = "chunked"
    q, k, v, gamma = jax.lax.stop_gradient((q, k, v, gamma))
    if chosen in ("pallas", "pallas_interpret") and not is_shared(q.shape):
        interpret = chosen == "pallas_interpret"
        return pallas_tpu.joint_attention_with_log_sums(
            q, k, v, text_len=text_len, gamma=gamma, interpret=interpret
        )
    out = _IMPLEMENTATIONS[chosen](q, k, v, text_len=text_len, gamma=gamma)
    both = _sums_over_mesh(q, k, v, text_len=text_len, gamma=gamma).swapaxes(1, 2)
    return out, LogSums(both[..., 0], both[..., 1])


@partial(over_mesh, whole_sequences=True)
def _sums_over_mesh(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
) -> Float[Array, "b s h 2"]:
    """`chunked.log_sums`, with axes that a mesh shares as it shares an attention's output."""
    del v
    sums = chunked.log_sums(q, k, text_len=text_len, gamma=gamma)
    return jnp.stack(sums, axis=-1).swapaxes(1, 2)


def _observed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    text_len: int,
    gamma: Gamma | None,
    implementation: Implementation,
) -> Float[Array, "b s h d"]:
    out, sums = joint_attention_with_log_sums(
        q, k, v, text_len=text_len, gamma=gamma, implementation=implementation
    )
    gamma = _checked(q, k, v, text_len, gamma)
    observing.see(observing.Attention(q, k, text_len, gamma, sums))
    return out


def _checked(
    q: jax.Array, k: jax.Array, v: jax.Array, text_len: int, gamma: Gamma | None
) -> Float[Array, " b"]:
    """Gamma for each sample, ones for None. Raises ValueError for what does not fit together."""
    if not (q.shape == k.shape == v.shape and q.ndim == 4):
        raise ValueError(
            f"q, k, v must share one [b, s, h, d] shape; got {q.shape}, {k.shape}, {v.shape}"
        )
    if not 0 <= text_len <= q.shape[1]:
        raise ValueError(f"text_len is {text_len}; the sequence has {q.shape[1]} tokens")
    samples = q.shape[:1]
    if gamma is None:
        return jnp.ones(samples, jnp.float32)
    is_real = isinstance(gamma, (int, float, np.number, np.ndarray, jax.Array)) and (
        not jnp.iscomplexobj(gamma)
    )
    if not is_real or jnp.shape(gamma) not in ((), samples):
        got = jnp.shape(gamma) if is_real else f"a {type(gamma).__name__}"
        raise ValueError(
            f"gamma must be a number or an array of shape {samples}, one per sample; got {got}"
        )
    return jnp.broadcast_to(jnp.asarray(gamma, jnp.float32), samples)


def _chosen(implementation: Implementation) -> Implementation:
    """What runs. Raises ValueError for a name that is unknown or cannot run here."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"unknown attention implementation {implementation!r}; "
            f"choose one of {', '.join(get_args(Implementation))}"
        )
    kind = pallas_tpu.device_kind()
    on_tpu = kind.startswith("TPU")
    if implementation == "auto":
        if on_tpu:
            return "pallas"
        return "split" if jax.default_backend() == "gpu" else "chunked"
    if implementation == "pallas" and not on_tpu:
        raise ValueError(
            f"the Pallas kernel is compiled for TPUs and this is {kind!r}; take 'auto', or "
            "'pallas_interpret' to run it here, slowly"
        )
    return implementation


_chunked_over_mesh = over_mesh(chunked.joint_attention, whole_sequences=True)
"""Left to itself on a mesh, XLA would gather everything on every device for the loops."""


def _as_vmem_allows(q: Float[Array, "b s h d"], text_len: int) -> Attend:
    """For the TPU that is compiled for: the kernel, or `chunked` where it has no room in VMEM."""
    shape = local_shape(q.shape)
    lack = _lack_of_room("forward", q, shape, text_len)
    if lack is not None:
        _warn_of_chunks(lack)
        return _chunked_over_mesh
    lack = _lack_of_room("backward", q, shape, text_len)
    if lack is not None:
        return partial(_kernel_unless_differentiated, lack)
    return _IMPLEMENTATIONS["pallas"]


def _lack_of_room(
    direction: pallas_tpu.Direction,
    q: Float[Array, "b s h d"],
    shape: tuple[int, ...],
    text_len: int,
) -> str | None:
    """Which numbers do not fit, in a sentence; None where that pass of the kernel has room.

    shape: of the queries that one device works on.
    """
    try:
        pallas_tpu.planned(direction, shape, keys=q.shape[1], text_len=text_len, dtype=q.dtype)
    except pallas_tpu.NoRoomError as error:
        return error.lack
    return None


@cache
def _warn_of_chunks(lack: str) -> None:
    """Warns, once per process for the same lack: a model's attention is traced many times."""
    LOGGER.warning("warning: %s; taking implementation='chunked', which is slower", lack)


def _kernel_unless_differentiated(
    lack: str, q: jax.Array, k: jax.Array, v: jax.Array, *, text_len: int, gamma: jax.Array
) -> jax.Array:
    """The kernel where no gradient is taken, else `chunked`, both forward and backward.

    lack: why the kernel's backward pass cannot be taken.
    """

    def chunks(q: jax.Array, k: jax.Array, v: jax.Array, gamma: jax.Array) -> jax.Array:
        return _chunked_over_mesh(q, k, v, text_len=text_len, gamma=gamma)

    def forward(*inputs: jax.Array) -> tuple[jax.Array, Callable]:
        _warn_of_chunks(lack)
        return jax.vjp(chunks, *inputs)

    @jax.custom_vjp
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, gamma: jax.Array) -> jax.Array:
        return _IMPLEMENTATIONS["pallas"](q, k, v, text_len=text_len, gamma=gamma)

    attend.defvjp(forward, lambda pull, d_out: pull(d_out))
    return attend(q, k, v, gamma)
