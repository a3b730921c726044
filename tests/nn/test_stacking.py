"""What the backward pass of a stack of blocks keeps, and what it computes again."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from taca_jax.nn.layers import Linear
from taca_jax.nn.stacking import make_stack, run_stack
from taca_jax.parallel.rules import IN
from tests.meshes import abstract_mesh

LAYERS, WIDTH, SAMPLES, TOKENS = 6, 8, 4, 2


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_no_device_keeps_parameters_that_it_has_gathered(param_dtype, remat):
    """Neither they nor a cast of them are among what the backward pass is left with, but once, the
    parameters as they are stored."""
    stack = make_stack(
        lambda **options: Linear(WIDTH, WIDTH, **options),
        LAYERS,
        rngs=nnx.Rngs(0),
        param_dtype=jnp.dtype(param_dtype),
        dtype=jnp.dtype("bfloat16"),
    )
    graph, state = nnx.split(stack)

    def pull(state, x):
        def run(state, x):
            stack = nnx.merge(graph, state)
            call = {"remat": remat, "sharding": {"blocks": IN}, "name": "blocks"}
            return run_stack(stack, lambda block, x: jnp.sin(block(x)), x, **call)

        return jax.vjp(run, state, x)[1]

    x = jnp.ones((SAMPLES, TOKENS, WIDTH), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(abstract_mesh(fsdp=4)):
        left = jax.eval_shape(pull, state, x)
    kernels = [x for x in jax.tree.leaves(left) if x.shape == (LAYERS, WIDTH, WIDTH)]
    assert [x.dtype.name for x in kernels] == [param_dtype]
