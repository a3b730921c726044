"""Low-rank adapters: where they go, what they add, and that they come off again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import FLUX_DEV, FluxTransformer
from taca_jax.nn.layers import Linear, LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora, attach, linears, remove_lora
from tests.models import FLUX_SCHNELL as FLUX
from tests.random_models import random_model, randomise

ADAPTED = {
    *(
        f"double_blocks.{stream}.{layer}"
        for stream in ("img", "txt")
        for layer in ("qkv.q", "qkv.k", "qkv.v", "out")
    ),
    *(f"single_blocks.{layer}" for layer in ("qkv.q", "qkv.k", "qkv.v", "out")),
}


@pytest.fixture
def model():
    return random_model(FLUX)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(1), 3)
    return (
        jax.random.normal(keys[0], (2, 8, 8, FLUX.latent_channels)),
        jnp.array([990.0, 500.0]),
        jax.random.normal(keys[1], (2, 3, FLUX.txt_dim)),
        jax.random.normal(keys[2], (2, FLUX.pooled_dim)),
    )


def lora_of(model):
    return nnx.state(model, LoRAParam)


@nnx.jit
def run(model, inputs, lora_scale=None):
    return model(*inputs, lora_scale=lora_scale)


def test_the_attention_projections_are_adapted_and_nothing_else(model):
    adapted = add_lora(model, LoRAConfig(rank=3, alpha=6), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    assert set(adapted) == ADAPTED
    assert len(adapted) == len(ADAPTED)
    for path, layer in linears(model):
        assert (layer.lora_a is not None) == (path in ADAPTED), path
        if layer.lora_a is not None:
            layers, inputs, outputs = layer.kernel.shape
            assert layer.lora_a.shape == (layers, inputs, 3)
            assert layer.lora_b.shape == (layers, 3, outputs)
            assert layer.lora_alpha_over_rank == 2.0


def test_the_full_size_model_has_the_papers_layers():
    def make():
        model = FluxTransformer(FLUX_DEV, rngs=nnx.Rngs(0))
        add_lora(model, LoRAConfig(rank=64), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
        return model

    factors = jax.tree.leaves(lora_of(nnx.eval_shape(make)))
    hidden, mlp = FLUX_DEV.hidden, FLUX_DEV.mlp_hidden
    double = 19 * 8 * 64 * 2 * hidden
    single = 38 * (3 * 64 * 2 * hidden + 64 * (2 * hidden + mlp))
    assert sum(factor.size for factor in factors) == double + single


def test_fresh_factors_leave_the_model_as_it_was(model, inputs):
    before = run(model, inputs)
    add_lora(model, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    for path, factor in nnx.to_flat_state(lora_of(model)):
        assert np.any(factor.get_value()) == (path[-1] == "lora_a")
    for scale in (None, jnp.zeros(2), jnp.ones(2)):
        np.testing.assert_allclose(run(model, inputs, scale), before, atol=1e-6)


def test_factors_act_as_a_change_of_the_kernels(model, inputs):
    add_lora(model, LoRAConfig(rank=2, alpha=3), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    randomise(model, LoRAParam, scale=0.3)
    adapted = run(model, inputs, jnp.ones(2))
    half = run(model, inputs, jnp.full(2, 0.5))
    for scale, expected in ((1.0, adapted), (0.5, half)):
        merged = nnx.clone(model)
        for _, layer in linears(merged):
            if layer.lora_a is not None:
                change = layer.lora_a[...] @ layer.lora_b[...] * layer.lora_alpha_over_rank
                layer.kernel[...] = layer.kernel[...] + scale * change
        remove_lora(merged)
        np.testing.assert_allclose(run(merged, inputs), expected, rtol=1e-3, atol=1e-3)


def test_strength_is_per_sample(model, inputs):
    plain = run(model, inputs)
    add_lora(model, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    randomise(model, LoRAParam, scale=0.3)
    mixed = run(model, inputs, jnp.array([0.0, 1.0]))
    both = run(model, inputs, jnp.ones(2))
    np.testing.assert_allclose(mixed[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], both[1], atol=1e-5)
    assert np.abs(both[1] - plain[1]).max() > 1e-2


def test_off_is_the_base_to_the_last_bit(model, inputs):
    off = jnp.zeros(2)
    before = run(model, inputs, off)
    add_lora(model, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    randomise(model, LoRAParam, scale=0.3)
    assert np.array_equal(run(model, inputs, off), before)
    assert np.array_equal(run(model, inputs), before)


def test_removing_leaves_the_base(model, inputs):
    graph = nnx.graphdef(model)
    before = run(model, inputs)
    add_lora(model, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    randomise(model, LoRAParam, scale=0.3)
    remove_lora(model)
    assert not jax.tree.leaves(lora_of(model))
    assert nnx.graphdef(model) == graph
    assert np.array_equal(run(model, inputs), before)


def test_seeds_decide_the_factors(model):
    drawn = []
    for seed in (0, 0, 1):
        add_lora(model, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(seed))
        drawn.append(np.asarray(model.double_blocks.img.qkv.q.lora_a[...]))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert np.abs(drawn[0]).max() <= FLUX.hidden**-0.5
    assert np.abs(drawn[0]).max() > 0.8 * FLUX.hidden**-0.5
    qkv = model.double_blocks.img.qkv
    assert not np.array_equal(qkv.q.lora_a[...], qkv.k.lora_a[...])


def test_targets_are_whole_paths(model):
    targets = (r"final_out", r".*\.mlp_in")
    assert set(add_lora(model, LoRAConfig(rank=2), targets, rngs=nnx.Rngs(0))) == {
        "final_out",
        "double_blocks.img.mlp_in",
        "double_blocks.txt.mlp_in",
        "single_blocks.mlp_in",
    }
    missed = r"lora\.targets match no layer of this model: nothing, qkv"
    with pytest.raises(UserError, match=missed):
        add_lora(model, LoRAConfig(), ("qkv", "nothing", "final_out"), rngs=nnx.Rngs(0))


def test_sizes_and_factors_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"lora\.rank is 0; it must be 1 or more"):
        LoRAConfig(rank=0)
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"lora\.alpha is .*; it must be positive"):
            LoRAConfig(alpha=alpha)
    layer = Linear(4, 6, rngs=nnx.Rngs(0), param_dtype=jnp.float32, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"do not fit a kernel \(4, 6\); expected \(4, 2\) and"):
        attach(layer, jnp.zeros((6, 2)), jnp.zeros((2, 4)), 1.0)
    assert layer.lora_a is None
