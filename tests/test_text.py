"""Captions to token ids, and token ids to what the transformer is told."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taca_jax.data.shapes_captions import VOCABULARY
from taca_jax.data.shapes_examples import GeneratedShapes
from taca_jax.data.shapes_examples import test_prompts as held_out_prompts
from taca_jax.errors import UserError
from taca_jax.text import ByteTokenizer, WordTokenizer, encode, load_tokenizer
from tests.random_models import random_model
from tests.shared import shared_path
from tests.training.tiny import T5

END = VOCABULARY.index("</s>")


def test_words_end_and_are_padded():
    tokenizer = load_tokenizer("shapes", 6)
    tokens = tokenizer(["a red circle", "", "A  Red\nSquare"])
    assert tokens.dtype == np.int32
    assert tokens.shape == (3, 6)
    words = [[VOCABULARY[i] for i in row] for row in tokens]
    assert words[0] == ["a", "red", "circle", "</s>", "<pad>", "<pad>"]
    assert words[1] == ["</s>"] + ["<pad>"] * 5
    assert words[2][:4] == ["a", "red", "square", "</s>"]
    assert tokenizer.vocab_size == len(VOCABULARY)
    assert VOCABULARY[tokenizer.pad_id] == "<pad>"


def test_every_caption_of_the_shapes_data_fits_16_tokens():
    tokenizer = WordTokenizer(16)
    captions = [example["caption"] for example in GeneratedShapes("train", 300)]
    captions += [caption for _, caption in held_out_prompts(60, 0)]
    tokens = tokenizer(captions)
    assert ((tokens == END).sum(axis=1) == 1).all()
    assert len(np.unique(tokens, axis=0)) == len(set(captions))


def test_words_that_are_unknown_or_too_many_are_refused():
    tokenizer = WordTokenizer(4)
    assert tokenizer(["a red circle"]).shape == (1, 4)
    with pytest.raises(UserError, match="'a red red circle' takes 5 tokens; this model reads 4"):
        tokenizer(["a red red circle"])
    with pytest.raises(
        UserError, match="the word 'dog' is unknown to this model; it knows: "
    ) as refusal:
        tokenizer(["a red dog"])
    assert "<pad>" not in str(refusal.value)
    assert "circle" in str(refusal.value)


@given(st.text(max_size=40), st.integers(1, 50))
def test_bytes_read_back(caption, length):
    tokenizer = ByteTokenizer(length)
    (row,) = tokenizer([caption])
    assert row.dtype == np.int32
    assert row.max() < tokenizer.vocab_size
    content = row[row != tokenizer.pad_id]
    assert content[-1] == 1
    given_bytes = caption.encode(errors="replace")
    assert bytes((content[:-1] - 3).tolist()) == given_bytes[: length - 1]


def test_bytes_that_are_no_text_do_not_stop_it():
    assert load_tokenizer("bytes", 8)(["caf\udce9"]).shape == (1, 8)


def test_a_folders_tokenizer_is_the_originals():
    folder = shared_path("assets/t5_tokenizer")
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(str(folder), 12)
    captions = ["a red circle", "", "a photo of an astronaut riding a horse on the moon at night"]
    tokens = tokenizer(captions)
    assert tokens.shape == (3, 12)
    assert tokens.dtype == np.int32
    assert tokenizer.pad_id == 0
    assert (tokens == 1).sum(axis=1).tolist() == [1, 1, 1]  # also where it was cut
    original = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokens[0, :4].tolist() == original("a red circle")["input_ids"][:4]
    assert tokens.max() < tokenizer.vocab_size


def test_folders_without_a_usable_tokenizer_are_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"'nowhere' is neither shapes, bytes nor a folder with a"):
        load_tokenizer("nowhere", 8)
    for content in (None, "{", "[]", '{"model": {}}'):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="no tokenizer could be read from") as refusal:
            load_tokenizer(str(tmp_path), 8)
        assert "\n" not in str(refusal.value)


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
