"""TACA joint attention as two plain attentions, for hardware whose fused kernels know no gamma.

Image queries attend to [gamma * K_text, K_image], text queries to [K_text, K_image]: the same
logits, in the FLOPs of plain attention. In bfloat16 the scaled keys are rounded once more.
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
    """As `reference.joint_attention`, on cuDNN's fused attention where it serves, else on XLA's."""
    attend = _fused_attention if _cudnn_serves(q) else _xla_attention
    k_text, k_image = k[:, :text_len], k[:, text_len:]
    scaled = (k_text.astype(jnp.float32) * gamma[:, None, None, None]).astype(k.dtype)
    parts = []
    if text_len > 0:
        parts.append(attend(q[:, :text_len], k, v))
    if text_len < q.shape[1]:
        parts.append(attend(q[:, text_len:], jnp.concatenate([scaled, k_image], axis=1), v))
    return jnp.concatenate(parts, axis=1)


Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_fused_attention: Attend = partial(jax.nn.dot_product_attention, implementation="cudnn")


def _xla_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    def attend(queries: jax.Array, _: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(queries, k, v, implementation="xla")

    return over_query_chunks(attend, q, keys=k.shape[1])


def _cudnn_serves(q: jax.Array) -> bool:
    """cuDNN's kernels take half precision and heads of up to 128, a multiple of 8, on NVIDIA."""
    return (
        jax.default_backend() == "gpu"
        and "nvidia" in jax.devices()[0].device_kind.lower()
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )
