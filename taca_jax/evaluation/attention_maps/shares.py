"""How image tokens share their attention among text tokens, in one step of a sampling run."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from taca_jax.attention.chunked import text_shares
from taca_jax.attention.observing import Attention, observed
from taca_jax.errors import UserError
from taca_jax.nn.conditioning import Conditioning
from taca_jax.sampling.loop import Plan, guided_velocity


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shares:
    """Shares, 0 to 1, of the attention of image queries; float32.

    Of g groups of text keys: all of them, then those of each word.
    heads: of every layer and head, the mean over image positions.
    places: at every image position, the mean over heads and layers, or over one layer's heads.
    """

    heads: Float[Array, "b g l h"]
    places: Float[Array, "b g i"]


def shares_of_step(
    transformer: nnx.Module,
    text: Conditioning,
    latents: Float[Array, "b h w c"],
    step: Plan,
    words: Bool[Array, "b g t"],
    *,
    layer: int | None = None,
) -> Shares:
    """The shares in the forward pass of one step, of the positive prompt alone.

    latents: before the step. step: one entry of a plan. words: which text tokens belong to each
    group. layer: of which `places` tells.

    No score matrix is ever in memory: shares are exponentials of differences of log-sum-exps
    (`joint_attention_with_log_sums`), and those of words come from the products with text keys
    alone, in chunks of 16 MB. On one device the TPU kernel gives the log-sum-exps in its one pass;
    elsewhere, and over the mesh that is set, a second pass takes them in chunks. For one picture of
    FLUX at 1024 px and eight words, the TPU compiler plans 0.18 GB of temporary memory (for a
    forward pass that is not observed, 0.26 GB; here its velocity is not needed), and each layer
    adds its shares, 0.15 MB.

    Raises UserError for a layer that the model does not have.
    """
    graph, state = nnx.split(transformer)
    return _shares(graph, state, text, latents, step, words, layer)


@jax.jit(static_argnames=("graph", "layer"))
def _shares(
    graph: nnx.GraphDef,
    state: nnx.State,
    text: Conditioning,
    latents: Float[Array, "b h w c"],
    step: Plan,
    words: Bool[Array, "b g t"],
    layer: int | None,
) -> Shares:
    velocity = guided_velocity(nnx.merge(graph, state), text, None, jnp.float32(1.0))
    _, (heads, places) = observed(partial(_look, words), lambda: velocity(latents, step))
    if layer is not None and layer >= len(places):
        raise UserError(f"layer is {layer}; this model's joint attentions are 0..{len(places) - 1}")
    return Shares(
        heads=jnp.moveaxis(heads, 0, 2),
        places=places.mean(axis=0) if layer is None else places[layer],
    )


def _look(
    words: Bool[Array, "b g t"], attention: Attention
) -> tuple[Float[Array, "b g h"], Float[Array, "b g i"]]:
    """The shares of one layer: means over image positions, and over heads."""
    text, sums = attention.text_len, attention.sums
    of_all = sums.text_mass[:, None, :, text:]
    of_words = text_shares(
        attention.q[:, text:],
        attention.k[:, :text],
        words,
        whole=sums.whole[:, :, text:],
        gamma=attention.gamma,
    )
    shares: Float[Array, "b g h i"] = jnp.concatenate([of_all, of_words], axis=1)
    return shares.mean(axis=3), shares.mean(axis=2)
