"""Parts of MM-DiT blocks: attention projections, and one modality's stream.

Sources: black-forest-labs/flux, modules/layers.py; Stability-AI/sd3.5, mmditx.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.attention import Implementation
from taca_jax.attention.keeping import keepable
from taca_jax.nn.kinds import TransformerConfig
from taca_jax.nn.layers import (
    ZEROS,
    LayerOptions,
    Linear,
    LoRAScale,
    RMSNorm,
    gated,
    gelu,
    modulate,
    of_one_input,
)
from taca_jax.nn.norm_rotate import join, norm_rotate
from taca_jax.nn.rope import Rotation
from taca_jax.nn.stacking import MLP_PRODUCTS, QKV_PRODUCTS
from taca_jax.parallel.mesh import constrain_vectors

NORM_EPSILON = 1e-6

Products = tuple[Float[Array, "b s h d"], Float[Array, "b s h d"], Float[Array, "b s h d"]]
"""Of one stream: what queries, keys and values are made of."""


@dataclass(frozen=True)
class BlockInputs:
    """The inputs that all blocks of one forward pass share: conditioning and TACA's state."""

    vec: Float[Array, "b d"]
    text_len: int
    gamma: Float[Array, " b"] | None
    lora_scale: LoRAScale | None
    attention: Implementation


class QKV(nnx.Module):
    """Queries, keys and values of one stream.

    norms: whether queries and keys are RMS-normalised per head. bias: whether projections have one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        norms: bool = True,
        bias: bool = True,
        **options: Unpack[LayerOptions],
    ):
        self.num_heads = config.num_heads
        self.q = Linear(config.hidden, config.hidden, bias=bias, **options)
        self.k = Linear(config.hidden, config.hidden, bias=bias, **options)
        self.v = Linear(config.hidden, config.hidden, bias=bias, **options)
        self.q_norm: RMSNorm | None = nnx.data(None)
        self.k_norm: RMSNorm | None = nnx.data(None)
        if norms:
            rngs, param_dtype = options["rngs"], options["param_dtype"]
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim, rngs=rngs, param_dtype=param_dtype, epsilon=NORM_EPSILON)
                for _ in range(2)
            )

    def __call__(self, x: Float[Array, "b s d"], lora_scale: LoRAScale | None) -> Products:
        """Each [b, s, h, d], before norms (`joint_qkv`)."""

        def heads(y: jax.Array) -> Float[Array, "b s h d"]:
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        products = of_one_input((self.q, self.k, self.v), x, lora_scale)
        q, k, v = map(heads, keepable(products, QKV_PRODUCTS))
        return q, k, v


def joint_qkv(
    streams: Sequence[QKV], products: Sequence[Products], rotation: Rotation | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values [b, s, h, d] of the joint sequence of some streams, given the
    products of each: queries and keys normalised if streams have norms, and rotated."""
    q, k, v = zip(*products, strict=True)
    q_norms, k_norms = ([getattr(qkv, name) for qkv in streams] for name in ("q_norm", "k_norm"))
    if q_norms[0] is None:
        assert rotation is None  # no family has one without the other
        return join(q), join(k), join(v)
    return norm_rotate(q, q_norms, rotation), norm_rotate(k, k_norms, rotation), join(v)


class Stream(nnx.Module):
    """One modality's part of a block: its modulation, projections and MLP.

    mods: how many modulation vectors there are. The first six are shift, scale and gate of the
    joint attention and of the MLP; the block itself uses any others.
    norms: as in QKV.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        mods: int = 6,
        norms: bool = True,
        **options: Unpack[LayerOptions],
    ):
        self.mods = mods
        self.mod = Linear(config.hidden, mods * config.hidden, kernel_init=ZEROS, **options)
        self.qkv = QKV(config, norms=norms, **options)
        self.out = Linear(config.hidden, config.hidden, **options)
        self.mlp_in = Linear(config.hidden, config.mlp_hidden, **options)
        self.mlp_out = Linear(config.mlp_hidden, config.hidden, **options)

    def modulation(self, inputs: BlockInputs) -> list[Float[Array, "b d"]]:
        """The modulation vectors, in the order of the class docstring."""
        vectors = constrain_vectors(self.mod(inputs.vec, inputs.lora_scale))
        return jnp.split(vectors, self.mods, axis=-1)

    def finish(
        self,
        x: Float[Array, "b s d"],
        attended: Float[Array, "b s d"],
        modulation: list[jax.Array],
        lora_scale: LoRAScale | None,
        extra: Float[Array, "b s d"] | None = None,
    ) -> Float[Array, "b s d"]:
        """The residual stream after the attention's output projection and the MLP; `extra` is added
        between the two."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate, *_ = modulation
        x = gated(x, gate, keepable(self.out(attended, lora_scale), MLP_PRODUCTS))
        x = x if extra is None else x + extra
        y = self.mlp_in(modulate(x, mlp_shift, mlp_scale), lora_scale)
        y = keepable(y, MLP_PRODUCTS)
        return gated(x, mlp_gate, self.mlp_out(gelu(y), lora_scale))


def layer_tokens(path: str, image: int, text: int, *, joint: re.Pattern[str] | None = None) -> int:
    """The number of tokens of a sample that the linear layer at `path` processes.

    joint: matches the layers that process image and text together. Modulations, and embedders of
    the time, the guidance and the pooled text, process one vector.
    """
    if re.search(r"(mod|_in\.linear_[12])$", path):
        return 1
    if joint is not None and joint.fullmatch(path):
        return image + text
    if ".txt." in path or path == "txt_in":
        return text
    return image


def kept_products(path: str) -> dict[str, float]:
    """What a policy may keep of the products of the linear layer at `path` of a block: the share of
    them by its name (`nn.stacking`)."""
    if re.fullmatch(r".*\.qkv\.[qkv]", path):
        return {QKV_PRODUCTS: 1.0}
    if re.fullmatch(r".*\.(img|txt)\.out|.*\.mlp_in", path):
        return {MLP_PRODUCTS: 1.0}
    return {}
