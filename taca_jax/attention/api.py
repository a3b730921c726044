"""One entry point to TACA joint attention, whatever runs beneath it."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from taca_jax.attention import chunked, reference, split

Implementation = Literal["auto", "reference", "split", "chunked"]

_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.joint_attention,
    "split": split.joint_attention,
    "chunked": chunked.joint_attention,
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
    `auto` takes `split` (cuDNN) on GPUs and `chunked` elsewhere.

    Raises ValueError for shapes that do not fit, a text_len outside 0..s, or an unknown
    implementation.
    """
    if not (q.shape == k.shape == v.shape and q.ndim == 4):
        raise ValueError(
            f"q, k, v must share one [b, s, h, d] shape; got {q.shape}, {k.shape}, {v.shape}"
        )
    if not 0 <= text_len <= q.shape[1]:
        raise ValueError(f"text_len is {text_len}; the sequence has {q.shape[1]} tokens")
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"unknown attention implementation {implementation!r}; "
            f"choose one of {', '.join(get_args(Implementation))}"
        )
    if gamma is None:
        gamma = jnp.ones(q.shape[0], jnp.float32)
    if gamma.shape != q.shape[:1]:
        raise ValueError(f"gamma must have shape {q.shape[:1]}, one per sample; got {gamma.shape}")
    if implementation == "auto":
        implementation = "split" if jax.default_backend() == "gpu" else "chunked"
    return _IMPLEMENTATIONS[implementation](q, k, v, text_len=text_len, gamma=gamma)
