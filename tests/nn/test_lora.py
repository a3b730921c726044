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
from taca_jax.nn.lora import (
    LoRAConfig,
    add_lora,
    append_lora,
    attach,
    count_loras,
    drop_lora,
    linears,
    remove_lora,
)
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


def random_factors(model, seed, rank, paths=None):
    """Factors by path, of every layer or of some."""
    rng = np.random.default_rng(seed)
    return {
        path: tuple(
            jnp.asarray(rng.normal(0, 0.3, (*stack, *shape)), jnp.float32)
            for shape in ((inputs, rank), (rank, outputs))
        )
        for path, layer in linears(model)
        for *stack, inputs, outputs in [layer.kernel.shape]
        if paths is None or path in paths
    }


STYLE = {"img_in", "single_blocks.qkv.q", "double_blocks.img.out", "single_blocks.mlp_in"}
"""Some are layers that a LoRA of the attention adapts too, others not."""


def merged(model, *loras):
    """The model with kernels W + s1 A1 B1 + s2 A2 B2, summed in float64."""
    whole = nnx.clone(model)
    remove_lora(whole)
    for path, layer in linears(whole):
        kernel = np.asarray(layer.kernel[...], np.float64)
        for factors, strength in loras:
            if path in factors:
                a, b = (np.asarray(factor, np.float64) for factor in factors[path])
                kernel = kernel + strength * a @ b
        layer.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return whole


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_two_loras_are_the_sum_of_their_changes(model, inputs):
    """Of different ranks, and on different layers; each with a strength for each sample."""
    one, two = random_factors(model, 0, 3, ADAPTED), random_factors(model, 1, 5, STYLE)
    plain = run(model, inputs)
    for factors in (one, two):
        append_lora(model, factors)
    assert count_loras(model) == 2
    ranks = {path: layer.lora_ranks for path, layer in linears(model) if layer.lora_ranks}
    assert ranks["single_blocks.qkv.q"] == (3, 5)
    assert ranks["single_blocks.qkv.k"] == (3, 0)
    assert ranks["img_in"] == (0, 5)
    strengths = jnp.array([[0.8, -0.5], [0.0, 1.5]])
    ours = run(model, inputs, strengths)
    for sample, (first, second) in enumerate(strengths):
        expected = run(merged(model, (one, first), (two, second)), inputs)
        assert relative(ours[sample], expected[sample]) <= 1e-5
        assert relative(ours[sample], plain[sample]) > 0.01
    # One number for each sample is the strength of all.
    both = run(merged(model, (one, 0.7), (two, 0.7)), inputs)
    assert relative(run(model, inputs, jnp.full(2, 0.7)), both) <= 1e-5
    np.testing.assert_allclose(run(model, inputs, jnp.zeros((2, 2))), plain, rtol=1e-5, atol=1e-5)


def test_each_of_several_loras_comes_off_alone(model, inputs):
    one, two, three = (
        random_factors(model, seed, rank, paths)
        for seed, rank, paths in ((0, 3, ADAPTED), (1, 5, STYLE), (2, 2, ADAPTED))
    )
    for factors in (one, two, three):
        append_lora(model, factors)
    drop_lora(model, 1)
    left = run(model, inputs, jnp.array([[0.5, 2.0]] * 2))
    assert relative(left, run(merged(model, (one, 0.5), (three, 2.0)), inputs)) <= 1e-5
    assert dict(linears(model))["img_in"].lora_a is None
    drop_lora(model, 0)
    append_lora(model, two)  # attached anew, now as the last
    left = run(model, inputs, jnp.array([[2.0, 0.5]] * 2))
    assert relative(left, run(merged(model, (three, 2.0), (two, 0.5)), inputs)) <= 1e-5
    drop_lora(model, 0)
    drop_lora(model, 0)
    assert count_loras(model) == 0
    assert not jax.tree.leaves(lora_of(model))


def test_a_lora_beside_one_that_was_made_for_training(model, inputs):
    """Whose alpha is not its rank."""
    add_lora(model, LoRAConfig(rank=2, alpha=3), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    randomise(model, LoRAParam, scale=0.3)
    own = {
        path: (layer.lora_a.get_value(), layer.lora_b.get_value() * 1.5)
        for path, layer in linears(model)
        if layer.lora_a is not None
    }
    style = random_factors(model, 1, 5, STYLE)
    append_lora(model, style)
    expected = run(merged(model, (own, 1.0), (style, 0.5)), inputs)
    assert relative(run(model, inputs, jnp.array([[1.0, 0.5]] * 2)), expected) <= 1e-5


def test_strengths_of_another_number_of_loras_are_refused(model, inputs):
    append_lora(model, random_factors(model, 0, 2, ADAPTED))
    with pytest.raises(ValueError, match="strengths of 2 LoRAs; 1 are attached"):
        run(model, inputs, jnp.ones((2, 2)))
