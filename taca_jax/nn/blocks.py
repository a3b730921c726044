"""What the blocks of both MM-DiTs are made of: projections and one modality's stream.

Sources: black-forest-labs/flux, modules/layers.py; Stability-AI/sd3.5, mmditx.py.
"""

import re
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.attention import Implementation
from taca_jax.nn.layers import ZEROS, Linear, RMSNorm, from_tiles, modulate, to_tiles
from taca_jax.parallel.mesh import constrain_vectors

NORM_EPSILON = 1e-6


class Widths(Protocol):
    """What of a model's config these parts need."""

    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def mlp_hidden(self) -> int: ...


@dataclass(frozen=True)
class BlockInputs:
    """What every block of one forward pass shares: conditioning and TACA's state."""

    vec: Float[Array, "b d"]
    text_len: int
    gamma: Float[Array, " b"] | None
    lora_scale: Float[Array, " b"] | None
    attention: Implementation


class QKV(nnx.Module):
    """Queries, keys and values of one stream; with `norms` queries and keys are RMS-normalised per
    head."""

    def __init__(
        self,
        config: Widths,
        *,
        norms: bool = True,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
        dtype: jnp.dtype,
    ):
        types = {"rngs": rngs, "param_dtype": param_dtype, "dtype": dtype}
        self.num_heads = config.num_heads
        self.q = Linear(config.hidden, config.hidden, **types)
        self.k = Linear(config.hidden, config.hidden, **types)
        self.v = Linear(config.hidden, config.hidden, **types)
        self.q_norm: RMSNorm | None = nnx.data(None)
        self.k_norm: RMSNorm | None = nnx.data(None)
        if norms:
            norm = {"rngs": rngs, "param_dtype": param_dtype, "epsilon": NORM_EPSILON}
            self.q_norm = RMSNorm(config.head_dim, **norm)
            self.k_norm = RMSNorm(config.head_dim, **norm)

    def __call__(
        self, x: Float[Array, "b s d"], lora_scale: Float[Array, " b"] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Each [b, s, h, d]."""

        def heads(y: jax.Array) -> Float[Array, "b s h d"]:
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        q, k, v = (heads(linear(x, lora_scale)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                from_tiles(norm(to_tiles(y)), y.shape[1])
                for norm, y in ((self.q_norm, q), (self.k_norm, k))
            )
        return q, k, v


class Stream(nnx.Module):
    """One modality's part of a block: its modulation, projections and MLP.

    `mods` vectors modulate: shift, scale and gate of the joint attention, of the MLP, and what the
    block itself has use for.
    """

    def __init__(
        self,
        config: Widths,
        *,
        mods: int = 6,
        norms: bool = True,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype,
        dtype: jnp.dtype,
    ):
        types = {"rngs": rngs, "param_dtype": param_dtype, "dtype": dtype}
        self.mods = mods
        self.mod = Linear(config.hidden, mods * config.hidden, kernel_init=ZEROS, **types)
        self.qkv = QKV(config, norms=norms, **types)
        self.out = Linear(config.hidden, config.hidden, **types)
        self.mlp_in = Linear(config.hidden, config.mlp_hidden, **types)
        self.mlp_out = Linear(config.mlp_hidden, config.hidden, **types)

    def modulation(self, inputs: BlockInputs) -> list[Float[Array, "b d"]]:
        """The modulating vectors, in that order."""
        vectors = constrain_vectors(self.mod(inputs.vec, inputs.lora_scale))
        return jnp.split(vectors, self.mods, axis=-1)

    def finish(
        self,
        x: Float[Array, "b s d"],
        attended: Float[Array, "b s d"],
        modulation: list[jax.Array],
        lora_scale: Float[Array, " b"] | None,
        own: Float[Array, "b s d"] | None = None,
    ) -> Float[Array, "b s d"]:
        """The residual stream after attention's output projection, `own`, and the MLP."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate, *_ = modulation
        x = x + gate[:, None] * self.out(attended, lora_scale)
        x = x if own is None else x + own
        y = self.mlp_in(modulate(x, mlp_shift, mlp_scale), lora_scale)
        return x + mlp_gate[:, None] * self.mlp_out(nnx.gelu(y, approximate=True), lora_scale)


def join(txt: Float[Array, "b t h d"], img: Float[Array, "b i h d"]) -> Float[Array, "b s h d"]:
    """The joint sequence, text first; put together with heads merged, as a TPU holds them."""
    merged = (x.reshape(*x.shape[:2], -1) for x in (txt, img))
    joint = jnp.concatenate([*merged], axis=1)
    return joint.reshape(*joint.shape[:2], *txt.shape[2:])


def layer_tokens(path: str, image: int, text: int, *, joint: re.Pattern[str] | None = None) -> int:
    """On how many tokens of a sample a linear layer acts, by its path.

    joint: the layers that act on image and text together. Modulations and embedders of the time,
    the guidance and the pooled text act on one vector.
    """
    if re.search(r"(mod|_in\.linear_[12])$", path):
        return 1
    if joint is not None and joint.fullmatch(path):
        return image + text
    if ".txt." in path or path == "txt_in":
        return text
    return image
