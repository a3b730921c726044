"""TACA joint attention as two plain attentions, for GPUs, whose fused kernels know no gamma.

Image queries attend to [gamma * K_text, K_image], text queries to [K_text, K_image]. That gives the
same logits at the cost of plain attention; in bfloat16 the scaled keys are rounded once more.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from taca_jax.attention.chunked import over_query_chunks


def joint_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    text_len: int,
    gamma: Float[Array, " b"],
) -> Float[Array, "b s h d"]:
    """As `reference.joint_attention`: cuDNN's fused attention where it can be used, else XLA's."""
    attend = _fused_attention if _cudnn_can(q) else _xla_attention
    k_text, k_image = k[:, :text_len], k[:, text_len:]
    scaled = (k_text.astype(jnp.float32) * gamma[:, None, None, None]).astype(k.dtype)
    parts = []
    if text_len > 0:
        parts.append(attend(q[:, :text_len], k, v))
    if text_len < q.shape[1]:
        parts.append(attend(q[:, text_len:], jnp.concatenate([scaled, k_image], axis=1), v))
    return jnp.concatenate(parts, axis=1)


Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Plain attention: q, k, v `[b, s, h, d]` -> output."""

_fused_attention: Attend = partial(jax.nn.dot_product_attention, implementation="cudnn")


def _xla_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    def attend(queries: jax.Array, _: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(queries, k, v, implementation="xla")

    return over_query_chunks(attend, q, keys=k.shape[1])


def _cudnn_can(q: jax.Array) -> bool:
    """cuDNN needs an NVIDIA GPU, half precision, and a head size of at most 128 that 8 divides."""
    return (
        jax.default_backend() == "gpu"
        and "nvidia" in jax.devices()[0].device_kind.lower()
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )
