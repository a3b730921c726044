"""Chooses what the backward pass recomputes (`nn.stacking.Remat`), by the memory of the devices.

What is kept is counted without running or compiling anything: the arrays that JAX leaves to the
transformer's backward pass, of two samples less those of one.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import linears
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.batches import samples_together
from taca_jax.parallel.choice import memory_of
from taca_jax.parallel.mesh import CONTEXT_AXIS

if TYPE_CHECKING:
    from taca_jax.training.models import RunModels

CANDIDATES: tuple[Remat, ...] = ("attention+qkv+mlp", "attention+qkv", "attention")
"""What `auto` takes the first of that fits, else `full`. Not `none`: what it keeps beside products
takes longer to write and read than to compute."""

FREE_SHARE = 0.9
"""The share of a device's memory that a step may take by this count. The rest is for what the
compiler needs beside it."""

BLOCKS_AT_WORK = 4
"""Blocks' worth of all activations that the backward pass of one block holds at the most: FLUX.1's
double blocks on v6e, by the compiler's figures."""


def choose_remat(models: "RunModels", mesh: Mesh | None) -> Remat:
    """What the backward passes of a run on a mesh should recompute: as configured, or by `auto` as
    the memory of its devices allows; all, where that is not known."""
    config = models.config
    if config.remat != "auto":
        return config.remat
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    memory = memory_of(device)
    if memory is None:
        return "full"
    placed = replace(models, mesh=mesh, remat="full")
    groups, context = (1, 1) if mesh is None else (samples_together(mesh), mesh.shape[CONTEXT_AXIS])
    return first_that_fits(
        partial(kept_bytes, models),
        samples=config.data.batch_size / groups / context,
        blocks=block_count(abstract_transformer(models, "full")),
        room=FREE_SHARE * memory - placed.step_bytes(),
    )


def first_that_fits(
    kept: Callable[[Remat], float], *, samples: float, blocks: int, room: float
) -> Remat:
    """The first of CANDIDATES that fits, or `full`.

    kept: bytes of a sample's activations that are kept. samples: on a device. blocks: of the
    transformer. room: bytes of a device for activations.
    """
    all_kept, least = kept(CANDIDATES[0]), kept("full")
    at_work = BLOCKS_AT_WORK * (all_kept - least) / blocks
    for remat in CANDIDATES:
        if samples * (kept(remat) + at_work) <= room:
            return remat
    return "full"


def kept_bytes(models: "RunModels", remat: Remat) -> int:
    """Bytes of the activations of one sample that the backward pass is left with."""
    trained = LoRAParam if models.config.adapts else nnx.Param
    model = abstract_transformer(models, remat)
    one, two = (residual_bytes(model, _inputs(models, samples), trained) for samples in (1, 2))
    return two - one


def abstract_transformer(models: "RunModels", remat: Remat) -> Any:
    """The transformer of a run, on no mesh."""
    return replace(models, mesh=None, remat=remat).abstract_transformer()


def residual_bytes(model: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]], trained: Any) -> int:
    """Bytes of the arrays that the backward pass of an abstract model would be given."""
    graph, leaves, frozen = nnx.split(model, trained, ...)

    def pull(leaves: nnx.State, frozen: nnx.State, *arguments: Any, **options: Any) -> Any:
        def run(leaves: nnx.State) -> jax.Array:
            return nnx.merge(graph, leaves, frozen)(*arguments, **options)

        return jax.vjp(run, leaves)[1]

    arguments, options = inputs
    left = jax.eval_shape(pull, leaves, frozen, *arguments, **options)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(left))


def block_count(model: Any) -> int:
    """How many blocks are in the stacks of a transformer."""
    stacks = {
        path.partition(".")[0]: layer.kernel.shape[0]
        for path, layer in linears(model)
        if len(layer.kernel.shape) == 3
    }
    return sum(stacks.values())


def _inputs(models: "RunModels", samples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Abstract arguments of the transformer's call, as training makes it."""
    config = models.transformer
    side = models.config.data.resolution // models.autoencoder.downscale

    def array(*shape: int, dtype: DTypeLike = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((samples, *shape), dtype)

    arguments = (
        array(side, side, config.latent_channels),
        array(),
        array(models.reading.tokens, config.txt_dim, dtype=models.config.dtype),
        array(config.pooled_dim),
    )
    options = {"gamma": array(), "lora_scale": array()}
    if models.family.embeds_guidance(config):
        options["guidance"] = array()
    return arguments, options
