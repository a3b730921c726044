"""TACA joint attention written out: what fast implementations are tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def joint_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
) -> Float[Array, "b s h d"]:
    """Softmax attention over all keys; logits of image queries and text keys are times gamma.

    The logits are q k^T / sqrt(d), and the first `text_len` tokens are text. Everything is computed
    in float32 at the highest precision, with the whole score matrix in memory; the result has q's
    dtype. Source: equation 7 of arXiv 2506.07986.
    """
    out_dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    precision = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision) / jnp.sqrt(q.shape[-1])
    is_text = jnp.arange(q.shape[1]) < text_len
    image_to_text = ~is_text[:, None] & is_text[None, :]
    logits = logits * jnp.where(image_to_text, gamma[:, None, None, None].astype(jnp.float32), 1.0)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision).astype(out_dtype)
