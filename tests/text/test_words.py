"""The token ids of a prompt's words."""

import numpy as np
import pytest
import transformers

from taca_jax.errors import UserError
from taca_jax.text.tokenizers import JoinedTokenizer, Tokenizer, load_tokenizer
from taca_jax.text.words import ids_of_word, words_of
from tests.shared import shared_path

PROMPT = "Two striped circles and one circle"


def places(tokenizer: Tokenizer, prompt: str, word: str) -> list[int]:
    return np.flatnonzero(ids_of_word(tokenizer, prompt, word)).tolist()


def test_words_are_whole_and_found_wherever_they_are():
    tokenizer = load_tokenizer("shapes", 8)
    assert places(tokenizer, PROMPT, "circle") == [5]
    assert places(tokenizer, PROMPT, "two") == [0]
    assert places(tokenizer, PROMPT, "one  circle") == [4, 5]
    assert places(tokenizer, "a circle above a square", "a") == [0, 3]
    assert len(ids_of_word(tokenizer, PROMPT, "two")) == 8


def test_bytes_of_a_word():
    tokenizer = load_tokenizer("bytes", 16)
    assert places(tokenizer, "café au lait", "au") == [6, 7]  # é is two bytes
    assert places(tokenizer, "café au lait", "café") == [0, 1, 2, 3, 4]
    joined = JoinedTokenizer((load_tokenizer("bytes", 4), tokenizer))
    assert places(joined, "a red cup", "red") == [2, 4 + 2, 4 + 3, 4 + 4]


@pytest.mark.parametrize(
    ("name", "reader"), [("t5_tokenizer", "AutoTokenizer"), ("clip_tokenizer", "CLIPTokenizer")]
)
def test_pieces_of_a_word_in_published_tokenizers(name, reader):
    folder = shared_path(f"assets/{name}")
    tokenizer = load_tokenizer(str(folder), 24)
    original = getattr(transformers, reader).from_pretrained(str(folder))
    prompt = "An extraordinarily-shaped Red cup; unicyclists, a red-hot stove"
    (ids,) = tokenizer([prompt])
    for word, times in (("extraordinarily-shaped", 1), ("red", 2), ("unicyclists", 1)):
        found = places(tokenizer, prompt, word)
        text = original.decode(ids[found]).lower().replace(" ", "")
        assert text == word * times
    assert len(places(tokenizer, prompt, "unicyclists")) > 1


def test_words_of_a_prompt():
    assert words_of("a cat's hat, a well-known HAT (red) on 2 cats") == [
        *("a", "cat's", "hat", "well-known", "HAT", "red", "on", "2", "cats")
    ]


def test_words_that_are_not_there_or_cut_off():
    tokenizer = load_tokenizer("bytes", 8)
    with pytest.raises(UserError, match="word 'dog' is not in the prompt 'a dogma'; its words ar"):
        ids_of_word(tokenizer, "a dogma", "dog")
    with pytest.raises(UserError, match=r"its words are: a, dogma$"):
        ids_of_word(tokenizer, "a dogma", " ")
    with pytest.raises(UserError, match="word 'red' stands behind the part of the prompt that"):
        ids_of_word(tokenizer, "a circle, red", "red")
