"""Questions as BLIP was asked them in T2I-CompBench."""

import re

QUESTION_TOKENS = 35
"""The longest question; further tokens are cut."""

_MAX_WORDS = 50


def question_about(phrase: str) -> str:
    """The question about a noun phrase: "a green bench?", in lower case, without the punctuation
    that BLIP's authors remove, and of at most 50 words."""
    plain = re.sub(r"[.!\"()*#:;~]", "", f"{phrase}?".lower()).rstrip(" ")
    return " ".join(plain.split(" ")[:_MAX_WORDS])
