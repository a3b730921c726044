"""The FLUX.2 transformer: what its backward pass may keep changes no gradient."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.nn.stacking import KEPT
from tests.compare import relative_error
from tests.families.flux2.tiny import FLUX2
from tests.random_models import random_model, randomise

BATCH = 2


def gradients(remat):
    """Of all parameters, and of a LoRA on all layers of the blocks."""
    model = random_model(FLUX2)
    add_lora(model, LoRAConfig(rank=2), (r"(double|single)_blocks\..*",), rngs=nnx.Rngs(0))
    randomise(model, LoRAParam, scale=0.3)
    model.remat = remat
    keys = jax.random.split(jax.random.key(7), 3)
    shape = (BATCH, 3, 4, FLUX2.latent_channels)
    latents, target = (jax.random.normal(key, shape) for key in keys[:2])
    txt = jax.random.normal(keys[2], (BATCH, 3, FLUX2.txt_dim))
    ones = jnp.ones(BATCH)

    @nnx.jit
    def grad(model):
        def loss(model):
            out = model(latents, 900 * ones, txt, gamma=1.2 * ones, lora_scale=ones)
            return jnp.mean(jnp.square(out - target))

        return nnx.grad(loss)(model)

    return nnx.to_pure_dict(grad(model))


@pytest.fixture(scope="module")
def kept():
    return gradients("none")


@pytest.mark.parametrize("remat", KEPT)
def test_remat_changes_no_gradient(kept, remat):
    paths = jax.tree_util.tree_leaves_with_path(kept)
    for (path, a), b in zip(paths, jax.tree.leaves(gradients(remat)), strict=True):
        assert jnp.linalg.norm(a) > 0, path
        assert relative_error(b, a) < 1e-5, path
