"""One entry point to TACA joint attention, whatever runs beneath it."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from taca_jax.attention import chunked, pallas_tpu, reference, split
from taca_jax.attention.log_sums import LogSums
from taca_jax.attention.sharded import over_mesh

Implementation = Literal["auto", "reference", "split", "chunked", "pallas", "pallas_interpret"]

_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.joint_attention,
    "split": split.joint_attention,
    "chunked": chunked.joint_attention,
    "pallas": over_mesh(pallas_tpu.joint_attention),
    "pallas_interpret": over_mesh(partial(pallas_tpu.joint_attention, interpret=True)),
}


def joint_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b s h d"]:
    """Attention over [text, image] tokens with image-query x text-key logits times gamma.

    The first `text_len` tokens (0 to s) are text. `gamma` is one traced temperature per sample;
    None is 1, the same path to the last bit. The softmax is in float32; the result has q's dtype.

    `auto` takes `pallas` on TPUs (over the mesh that is set, see `sharded`), `split` (cuDNN) on
    GPUs and `chunked` elsewhere. `pallas_interpret` runs the TPU kernel anywhere, slowly.

    Raises ValueError for shapes that do not fit, a text_len outside 0..s, an unknown
    implementation, or one that cannot run here.
    """
    gamma = _checked(q, k, v, text_len, gamma)
    attend = _IMPLEMENTATIONS[_chosen(implementation)]
    return attend(q, k, v, text_len=text_len, gamma=gamma)


def joint_attention_with_log_sums(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"] | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "b s h d"], LogSums]:
    """`joint_attention` and how much of it each query pays to text; for analysis, not training.

    On TPU both come from one pass of the kernel, on one device; elsewhere the sums take one more.
    No gradient flows through either. Raises as `joint_attention` does.
    """
    gamma = _checked(q, k, v, text_len, gamma)
    implementation = _chosen(implementation)
    q, k, v, gamma = jax.lax.stop_gradient((q, k, v, gamma))
    if implementation in ("pallas", "pallas_interpret"):
        return pallas_tpu.joint_attention_with_log_sums(
            *(q, k, v),
            text_len=text_len,
            gamma=gamma,
            interpret=implementation == "pallas_interpret",
        )
    out = _IMPLEMENTATIONS[implementation](q, k, v, text_len=text_len, gamma=gamma)
    return out, chunked.log_sums(q, k, text_len=text_len, gamma=gamma)


def _checked(
    q: jax.Array, k: jax.Array, v: jax.Array, text_len: int, gamma: jax.Array | None
) -> Float[Array, " b"]:
    """Gamma, or ones for None. Raises ValueError for what does not fit together."""
    if not (q.shape == k.shape == v.shape and q.ndim == 4):
        raise ValueError(
            f"q, k, v must share one [b, s, h, d] shape; got {q.shape}, {k.shape}, {v.shape}"
        )
    if not 0 <= text_len <= q.shape[1]:
        raise ValueError(f"text_len is {text_len}; the sequence has {q.shape[1]} tokens")
    if gamma is None:
        gamma = jnp.ones(q.shape[0], jnp.float32)
    if gamma.shape != q.shape[:1]:
        raise ValueError(f"gamma must have shape {q.shape[:1]}, one per sample; got {gamma.shape}")
    return gamma


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
