"""Where the words of a prompt are among its token ids."""

import re

import numpy as np
from jaxtyping import Bool

from taca_jax.errors import UserError
from taca_jax.text.tokenizers import Tokenizer


def words_of(prompt: str) -> list[str]:
    """The different words of a prompt, in their order, without punctuation."""
    return list(dict.fromkeys(re.findall(r"\w+(?:[-'’]\w+)*", prompt)))


def ids_of_word(tokenizer: Tokenizer, prompt: str, word: str) -> Bool[np.ndarray, " t"]:
    """Which of the prompt's token ids stand for a word, or for several successive ones.

    They are all ids that have a character of it, wherever it occurs; case does not matter. Raises
    UserError if the prompt does not contain it, or only behind what the tokenizer reads.
    """
    pattern = r"\s+".join(map(re.escape, word.split()))
    found = [] if not pattern else re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE)
    places = [match.span() for match in found]
    if not places:
        words = ", ".join(words_of(prompt))
        raise UserError(f"word {word!r} is not in the prompt {prompt!r}; its words are: {words}")
    marked = np.array(
        [
            any(start < last and first < stop for first, last in places)
            for start, stop in tokenizer.spans(prompt)
        ]
    )
    if not marked.any():
        raise UserError(
            f"word {word!r} stands behind the part of the prompt that the model reads; put it "
            "further to the front"
        )
    return marked
