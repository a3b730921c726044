"""How FLUX.2 reads prompts, and what Qwen3 makes of them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.families.flux2.text import Flux2Text, read_text
from taca_jax.formats.settings import Settings
from taca_jax.text import qwen3_layout
from taca_jax.text.encoders import StoredEncoders
from taca_jax.text.qwen3 import CHAT, READS
from taca_jax.text.tokenizers import FolderTokenizer
from taca_jax.text.words import ids_of_word
from tests.families.flux2.tiny import FLUX2, QWEN3
from tests.models import T5
from tests.random_models import random_model
from tests.shared import shared_path


@pytest.fixture(scope="module")
def text() -> Flux2Text:
    return Flux2Text(random_model(QWEN3), pad_id=0)


def stored(**configs) -> StoredEncoders:
    models = {
        name: SimpleNamespace(where=f"it/{name}", config=each) for name, each in configs.items()
    }
    return StoredEncoders("it", models, 7)


def test_what_is_read():
    reading = read_text(FLUX2, stored(text_encoder=QWEN3))
    assert reading is not None
    assert (reading.folders, reading.tokens, reading.frame) == (("text_encoder",), 7, CHAT)
    assert read_text(FLUX2, stored(text_encoder=T5)) is None
    with pytest.raises(UserError, match="gives 16 channels, the transformer reads 24"):
        read_text(FLUX2, stored(text_encoder=replace(QWEN3, reads=(9, 27))))


def test_padding_is_not_attended_to(text):
    """What comes before it is as without it; the padding itself has embeddings too."""
    tokens = np.array([[5, 6, 7, 0, 0, 0], [5, 6, 0, 8, 9, 0]])
    found = text(jnp.asarray(tokens))
    assert found.txt.shape == (2, 6, QWEN3.width)
    assert found.pooled.shape == (2, 0)
    alone = text(jnp.asarray(tokens[:1, :3]))
    np.testing.assert_allclose(found.txt[0, :3], alone.txt[0], atol=1e-5)
    assert np.abs(found.txt[0, 4] - found.txt[0, 5]).max() > 1e-3
    # The padding's token within a prompt is a token of it.
    other = text(jnp.asarray([[5, 6, 1, 8, 9, 0]]))
    assert np.abs(found.txt[1, 3] - other.txt[0, 3]).max() > 1e-3


def test_hidden_states_are_those_that_are_named(text):
    fewer = Flux2Text(random_model(replace(QWEN3, reads=(18,))), pad_id=0)
    tokens = jnp.asarray([[5, 6, 7, 0]])
    whole = np.split(np.asarray(text(tokens).txt), len(READS), axis=-1)
    np.testing.assert_allclose(whole[1], fewer(tokens).txt, atol=1e-5)


@pytest.fixture(scope="module")
def path():
    return shared_path("golden/flux2/tokenizer")


def test_the_frame_is_the_tokenizers_own_template(path):
    pytest.importorskip("jinja2")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a cat"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert said == "a cat".join(CHAT)


def test_words_are_found_within_the_frame(path):
    prompt = "a user on a red chair"
    tokenizer = FolderTokenizer(path, 64, CHAT)
    ids = tokenizer([prompt])[0]
    plain = transformers_text(tokenizer, ids[ids_of_word(tokenizer, prompt, "red")])
    assert plain.strip() == "red"
    # Not the word of the template.
    marked = np.flatnonzero(ids_of_word(tokenizer, prompt, "user"))
    assert marked.min() > np.flatnonzero(ids == ids[0])[0] + 1
    assert transformers_text(tokenizer, ids[marked]).strip() == "user"


def transformers_text(tokenizer: FolderTokenizer, ids) -> str:
    return tokenizer._tokenizer.decode(ids)


def test_what_is_cut_is_said(path):
    long = FolderTokenizer(path, 200, CHAT)
    assert long.cuts(["a red fox"]) == []
    ids = long(["a red fox on a blue chair"])[0]
    length = int((ids != long.pad_id).sum())
    short = FolderTokenizer(path, length - 12, CHAT)
    (line,) = short.cuts(["a red fox on a blue chair"])
    assert line.endswith('chair"') or "are cut" in line
    # What follows the prompt may be cut unsaid, as in the original.
    assert FolderTokenizer(path, length - 1, CHAT).cuts(["a red fox on a blue chair"]) == []


def test_settings_that_are_not_ours():
    fields = {
        "model_type": "qwen3",
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 36,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    }
    config = qwen3_layout.config_of(Settings(Path("x"), fields))
    assert config == replace(QWEN3, vocab_size=9)
    for change, words in (
        ({"num_hidden_layers": 24}, "a Qwen3 of 24 layers; those up to 27 are read"),
        ({"num_key_value_heads": 3}, "4 heads of 4 channels, and 3 of keys"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'; only 'qwen3'"),
    ):
        with pytest.raises(UserError, match=words):
            qwen3_layout.config_of(Settings(Path("x"), fields | change))
