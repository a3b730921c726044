"""The noun phrases of a prompt, about each of which BLIP-VQA asks one question.

Upstream takes spaCy's `noun_chunks` with the model `en_core_web_sm`, and so does `phrases=spacy`.
`phrases=rules` needs no model: it is for T2I-CompBench's prompts about attributes. It finds the
same phrases in those of the form "a green bench and a red car", most of the lists; in whole
sentences it may differ from spaCy. `phrases=FILE.json` maps each prompt to its phrases.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.evaluation.digests import digest_of

MAX_PHRASES = 8
"""Of a prompt; upstream ignores further ones."""

NOT_THINGS = ("top", "the side", "the left", "the right")
"""Phrases about places, which upstream leaves out."""

SPACY_MODEL = "en_core_web_sm"

Split = Callable[[str], list[str]]


def describe_source(source: str) -> str:
    """`spacy` or `rules`; of a file the beginning of its digest, so that a changed one is noticed.

    Raises UserError for a file that is not there.
    """
    return source if source in ("spacy", "rules") else f"file {digest_of(Path(source))[:16]}"


def phrase_splitter(source: str) -> Split:
    """The function that splits prompts: `spacy`, `rules`, or the name of a JSON file.

    It raises UserError for a prompt without any phrase. Raises UserError if spaCy or its model is
    not installed, or if the file cannot be read.
    """
    if source == "spacy":
        split = _spacy()
    elif source == "rules":
        split = by_rules
    else:
        split = _from_file(Path(source))

    def checked(prompt: str) -> list[str]:
        found = [phrase for phrase in split(prompt) if phrase not in NOT_THINGS][:MAX_PHRASES]
        if not found:
            raise UserError(
                f"phrases={source} finds none in {prompt!r}; name a JSON file that maps each "
                "prompt to a list of its phrases"
            )
        return found

    return checked


def _spacy() -> Split:
    try:
        import spacy  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise UserError(
            "phrases=spacy needs spaCy (the extra `compbench`) and its English model: pip install "
            f"spacy && python -m spacy download {SPACY_MODEL}; or set phrases=rules"
        ) from None
    try:
        parse = spacy.load(SPACY_MODEL)
    except OSError:
        raise UserError(
            f"spaCy has no model {SPACY_MODEL}; python -m spacy download {SPACY_MODEL}, or set "
            "phrases=rules"
        ) from None
    return lambda prompt: [chunk.text for chunk in parse(prompt).noun_chunks]


def _from_file(path: Path) -> Split:
    try:
        table = json.loads(path.read_text())
    except OSError:
        raise UserError(
            f"phrases={path} is neither spacy, rules, nor a file that is there"
        ) from None
    except ValueError as error:
        raise UserError(f"phrases={path} is not JSON ({error})") from None
    right = isinstance(table, Mapping) and all(
        isinstance(each, list) and all(isinstance(phrase, str) for phrase in each)
        for each in table.values()
    )
    if not right:
        raise UserError(f'phrases={path} must map prompts to lists: {{"a red car": ["a red car"]}}')
    return lambda prompt: table.get(prompt, [])


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("a an the its his her their two three")
_PREPOSITIONS = _words(
    "about above against along around as at behind below beneath beside between by down during for "
    "from in inside into near next of off on onto out over through to toward under up with within "
    "while which that who when than"
)
_COLORS = _words(
    "beige black blue brown gold golden gray green grey orange pink purple red silver tan white "
    "yellow"
)
_VERBS = _words(
    "is are was were be been being has have had sit sits sat sitting stood standing rest rests "
    "rested lie lies lay hang hangs hung hold holds held holding parked placed stacked arranged "
    "attached mounted kept keep left used waving served features flash shines provide provides "
    "provided made make write writes reads jot nap perch floated flowed led dominated displayed "
    "sparkled attracted"
)
_ADVERBS = _words("nearby neatly empty visible")
_ENDS = _PREPOSITIONS | _VERBS | _ADVERBS | _words("and or but , ; .")


def by_rules(prompt: str) -> list[str]:
    """The noun phrases of a prompt, by rules for those of T2I-CompBench.

    A phrase ends at a comma, "and", a preposition, or a verb of a short list, but not between two
    colours ("a black and white cat") or adjectives ("a long, narrow kitchen"). A determiner begins
    a new one; the word before it, if nothing else parts them, is a verb ("a bowl holds | the
    soup").
    """
    words = re.findall(r"[\w'’:-]+|[,;.]", prompt)
    phrases: list[list[str]] = [[]]
    for word, following in zip(words, [*words[1:], "."], strict=True):
        current = phrases[-1]
        if word.lower() in _DETERMINERS:
            if len(current) > 1:
                current.pop()
            phrases.append([word])
        elif _joins(current, word.lower(), following.lower()):
            current.append(word)
        elif word.lower() in _ENDS:
            phrases.append([])
        else:
            current.append(word)
    found = (" ".join(words).replace(" ,", ",") for words in phrases)
    return [phrase for phrase in found if phrase and phrase.lower() not in _DETERMINERS]


def _joins(before: list[str], word: str, following: str) -> bool:
    """Whether a word that could end a phrase belongs to the one that has begun with `before`."""
    if not before:
        return False
    if word == "and":
        return {before[-1].lower(), following} <= _COLORS
    if word == ",":
        first, adjectives = before[0].lower(), before[1:]
        return first in _DETERMINERS and len(adjectives) == 1 and following not in _DETERMINERS
    return word in _VERBS and following == "of"  # a noun: "the features of"
