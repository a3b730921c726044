"""Shares of attention are those of the whole softmax, in real models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.attention import chunked
from taca_jax.attention.observing import observed
from taca_jax.errors import UserError
from taca_jax.evaluation.attention_maps.shares import shares_of_step
from taca_jax.nn.conditioning import Conditioning
from taca_jax.sampling.loop import guided_velocity, make_plan
from taca_jax.taca import TacaConfig
from tests.models import FLUX, SD3
from tests.random_models import random_model

TEXT, SIDE, GAMMA = 5, 8, 1.5
WORDS = np.zeros((2, 2, TEXT), bool)
WORDS[0, 0, 1] = WORDS[0, 1, 2:4] = WORDS[1, 0, 4] = True  # the second sample's last group is empty
LAYERS = {FLUX: 5, SD3: 4}


def call(config):
    """A model, and inputs of two samples."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return jnp.asarray(rng.standard_normal((2, *shape), np.float32))

    text = Conditioning(
        txt=noise(TEXT, config.txt_dim),
        pooled=noise(config.pooled_dim),
        guidance=jnp.array([3.0, 4.0]) if config is FLUX else None,
    )
    latents = noise(SIDE, SIDE, config.latent_channels)
    plan = make_plan(np.array([0.9, 0.0], np.float32), TacaConfig(gamma=GAMMA, threshold=500))
    return random_model(config), text, latents, jax.tree.map(lambda x: x[0], plan)


@pytest.fixture(scope="module", params=[FLUX, SD3], ids=["flux", "sd3"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def expected(config):
    """Shares from all layers' softmax over whole matrices in float64: `[b, g, l, h, i]`."""
    model, text, latents, step = call(config)
    model.attention = "reference"

    @jax.jit
    def queries_and_keys(latents):
        velocity = guided_velocity(model, text, None, 1.0)
        return observed(lambda seen: (seen.q, seen.k), lambda: velocity(latents, step))[1]

    q, k = (np.asarray(x, np.float64) for x in queries_and_keys(latents))
    logits = np.einsum("lbqhd,lbkhd->lbhqk", q, k) / q.shape[-1] ** 0.5
    logits[..., TEXT:, :TEXT] *= GAMMA
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    groups = np.concatenate([np.ones((2, 1, TEXT)), WORDS], axis=1)
    return np.einsum("lbhit,bgt->bglhi", weights[..., TEXT:, :TEXT], groups)


@pytest.mark.parametrize("implementation", ["chunked", "reference", "pallas_interpret"])
def test_they_are_those_of_the_whole_softmax(config, expected, implementation, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_SCORES", 100)  # several chunks
    model, *inputs = call(config)
    model.attention = implementation
    shares = shares_of_step(model, *inputs, jnp.asarray(WORDS))
    assert shares.heads.shape == (2, 3, LAYERS[config], config.num_heads)
    np.testing.assert_allclose(shares.heads, expected.mean(axis=4), rtol=1e-5)
    np.testing.assert_allclose(shares.places, expected.mean(axis=(2, 3)), rtol=1e-5)
    assert not np.any(shares.heads[1, 2])


def test_places_of_one_layer_and_no_words():
    model, *inputs = call(FLUX)
    none = jnp.zeros((2, 0, TEXT), bool)
    shares = shares_of_step(model, *inputs, none, layer=3)
    every = shares_of_step(model, *inputs, none)
    assert shares.heads.shape == (2, 1, LAYERS[FLUX], FLUX.num_heads)
    np.testing.assert_array_equal(shares.heads, every.heads)
    here, all_layers = (each.places.mean(axis=2) for each in (shares, every))
    np.testing.assert_allclose(here, shares.heads[:, :, 3].mean(axis=2), rtol=1e-5)
    np.testing.assert_allclose(all_layers, shares.heads.mean(axis=(2, 3)), rtol=1e-5)
    assert np.abs(here - all_layers).min() > 1e-3
    with pytest.raises(UserError, match=r"layer is 5; this model's joint attentions are 0\.\.4"):
        shares_of_step(model, *inputs, none, layer=5)


def test_the_scores_of_1024_pixels_are_never_whole():
    """FLUX's joint sequence in one layer: 4608 x 4608 scores of a head would be 85 MB."""
    length, text, heads, width = 4608, 512, 24, 128
    qk = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
    groups = jax.ShapeDtypeStruct((1, 8, text), bool)

    def look(q, k, groups):
        sums = chunked.log_sums(q, k, text_len=text, gamma=jnp.ones(1))
        whole = sums.whole[:, :, text:]
        return chunked.text_shares(q[:, text:], k[:, :text], groups, whole=whole, gamma=jnp.ones(1))

    memory = jax.jit(look).lower(qk, qk, groups).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * heads * length * length * 4


def test_a_model_that_is_observed_computes_the_same():
    model, text, latents, step = call(SD3)
    graph, state = nnx.split(model)

    def velocity(state):
        return guided_velocity(nnx.merge(graph, state), text, None, 1.0)(latents, step)

    plain = jax.jit(velocity)(state)
    seen, found = jax.jit(
        lambda state: observed(lambda each: each.sums.text_mass, partial(velocity, state))
    )(state)
    np.testing.assert_allclose(seen, plain, rtol=1e-5, atol=1e-5)
    assert found.shape == (LAYERS[SD3], 2, SD3.num_heads, TEXT + (SIDE // 2) ** 2)
