"""Token ids to what the transformer is told."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.flux.text import FluxText
from taca_jax.families.sd3.text import SD3Text
from taca_jax.nn.kinds import abstract_model
from taca_jax.text.clip import CLIP_BIGG, CLIP_L
from taca_jax.text.encoders import encode
from taca_jax.text.t5 import T5_XXL
from taca_jax.text.tokenizers import load_tokenizer
from tests.random_models import random_model
from tests.training.tiny import T5


def test_the_pooled_embedding_is_the_mean_over_the_words():
    encoder = random_model(T5)
    tokens = load_tokenizer("shapes", 8)(["a red circle", ""])
    text = encode(encoder, tokens, 0)
    assert text.txt.shape == (2, 8, 32)
    assert text.pooled.shape == (2, 32)
    assert text.guidance is None
    np.testing.assert_allclose(text.txt, encoder(tokens), atol=1e-6)
    np.testing.assert_allclose(text.pooled[0], text.txt[0, :4].mean(0), atol=1e-5)
    np.testing.assert_allclose(text.pooled[1], text.txt[1, 0], atol=1e-5)
    nothing = encode(encoder, np.zeros((1, 8), np.int32), 0)
    assert np.isfinite(jax.device_get(nothing.pooled)).all()


def shapes_of(encoder, count: int):
    """What an abstract encoder would make of two prompts of `count` ids."""
    graph, state = nnx.split(encoder)
    ids = jax.ShapeDtypeStruct((2, count), jnp.int32)
    return jax.eval_shape(lambda state, ids: nnx.merge(graph, state)(ids), state, ids)


def test_full_size_text_of_flux_and_sd3_has_the_released_shapes():
    clip_l, clip_g, t5 = (
        abstract_model(config, dtype=jnp.bfloat16) for config in (CLIP_L, CLIP_BIGG, T5_XXL)
    )
    flux = shapes_of(FluxText(clip_l, t5), 77 + 512)
    assert (flux.txt.shape, flux.pooled.shape) == ((2, 512, 4096), (2, 768))
    for encoder, count in ((t5, 256), (None, 0)):
        sd3 = shapes_of(SD3Text(clip_l, clip_g, encoder, width=4096, t5_length=256), 154 + count)
        assert (sd3.txt.shape, sd3.pooled.shape) == ((2, 77 + 256, 4096), (2, 2048))
        assert sd3.txt.dtype == sd3.pooled.dtype == jnp.float32


@pytest.mark.parametrize(
    ("projection_dim", "width", "message"),
    [
        (None, 4096, "the first CLIP has no projection"),
        (768, 2000, "the two CLIPs are 2048 wide together; the transformer reads 2000"),
        (768, 4000, "T5 is 4096 wide; the transformer reads 4000"),
    ],
)
def test_encoders_that_sd3_cannot_read_with_are_refused(projection_dim, width, message):
    configs = (replace(CLIP_L, projection_dim=projection_dim), CLIP_BIGG, T5_XXL)
    models = (abstract_model(config, dtype=jnp.float32) for config in configs)
    with pytest.raises(UserError, match=message):
        SD3Text(*models, width=width, t5_length=256)
