"""Token ids to what the transformer is told."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.encoders import (
    T5Text,
    check_width,
    split_tokens,
    token_count,
)
from taca_jax.text.t5 import T5Config
from taca_jax.text.tokenizers import load_tokenizer
from tests.models import CLIP, FLUX, T5
from tests.random_models import random_model
from tests.text.abstract import stored

SHAPES_T5 = replace(T5, vocab_size=load_tokenizer("shapes", 1).vocab_size)


def test_the_pooled_embedding_of_a_t5_alone_is_the_mean_over_the_words():
    t5, tokenizer = random_model(SHAPES_T5), load_tokenizer("shapes", 8)
    tokens = tokenizer(["a red circle", ""])
    encoder = T5Text(t5, pad_id=tokenizer.pad_id)
    assert list(encoder.encoders) == [t5]
    text = encoder(tokens)
    assert text.txt.shape == (2, 8, t5.config.dim)
    assert text.pooled.shape == (2, t5.config.dim)
    assert text.guidance is None
    np.testing.assert_allclose(text.txt, t5(tokens), atol=1e-6)
    np.testing.assert_allclose(text.pooled[0], text.txt[0, :4].mean(0), atol=1e-5)
    np.testing.assert_allclose(text.pooled[1], text.txt[1, 0], atol=1e-5)
    nothing = encoder(np.full((1, 8), tokenizer.pad_id, np.int32))
    assert np.isfinite(jax.device_get(nothing.pooled)).all()


def test_each_encoder_has_its_own_ids():
    clip = random_model(CLIP)
    first, second, rest = split_tokens(jnp.arange(13)[None], (clip, clip))
    assert (first.tolist(), second.tolist()) == ([[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]])
    assert rest.tolist() == [[10, 11, 12]]
    assert (token_count(CLIP, 256), token_count(T5, 256)) == (5, 256)


def test_encoders_are_told_apart_by_their_configs():
    both = stored(text_encoder=CLIP, text_encoder_2=T5, text_encoder_3=CLIP)
    assert list(both.of_kind(T5Config, "T5", most=1)) == ["text_encoder_2"]
    assert list(both.of_kind(CLIPConfig, "CLIP", most=2)) == ["text_encoder", "text_encoder_3"]
    with pytest.raises(UserError, match=r"the pipeline has 2 CLIP encoders \(text_encoder, text_"):
        both.of_kind(CLIPConfig, "CLIP", most=1)
    with pytest.raises(UserError, match="the text_encoder holds no text encoder but a FluxConfig"):
        stored(text_encoder=FLUX).of_kind(T5Config, "T5", most=1)
    with pytest.raises(UserError, match="the text_encoder_2 is 8 wide, the transformer reads 12"):
        check_width(both.models["text_encoder_2"], 12)
