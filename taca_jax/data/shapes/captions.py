"""The language of the shapes data: objects, captions, claims, and what training never sees.

A `Description` says what a picture must show. Its `caption` is the text that the model reads, its
`claims` are what the scorer checks, and `parse_caption` leads from any such text back to the
description. Categories follow T2I-CompBench (Huang et al., 2023).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from taca_jax.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "cyan", "purple")
PLAIN = "plain"
SAID_TEXTURES = ("striped", "dotted", "checkered")
TEXTURES = (PLAIN, *SAID_TEXTURES)  # a caption never says "plain"
RELATIONS = ("left", "right", "above", "below")
COUNTS = ("one", "two", "three", "four")
CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy", "complex")

MAX_PHRASES = 3
MAX_TOKENS = 16  # words of the longest caption and the end token

_PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}
_JOINS = {
    "left": ("left", "of"),
    "right": ("right", "of"),
    "above": ("above",),
    "below": ("below",),
}

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
VOCABULARY: tuple[str, ...] = (
    *SPECIAL_TOKENS,
    *("a", "and", "of"),
    *COUNTS,
    *RELATIONS,
    *COLORS,
    *SAID_TEXTURES,
    *SHAPES,
    *_PLURALS.values(),
)


@dataclass(frozen=True, slots=True)
class Object:
    """A thing in a picture or a caption; None is an attribute that the caption leaves open."""

    shape: str
    color: str | None = None
    texture: str | None = None

    def matches(self, other: "Object") -> bool:
        """Whether `other`, a thing in a picture, is what this describes."""
        return (
            self.shape == other.shape
            and self.color in (None, other.color)
            and self.texture in (None, other.texture)
        )


@dataclass(frozen=True, slots=True)
class Present:
    """There is at least one such object."""

    object: Object


@dataclass(frozen=True, slots=True)
class Count:
    """There are exactly `count` such objects."""

    object: Object
    count: int


@dataclass(frozen=True, slots=True)
class Relation:
    """Some such `subject` lies to the `relation` of some such `object`."""

    subject: Object
    relation: str
    object: Object


Claim = Present | Count | Relation


@dataclass(frozen=True, slots=True)
class Phrase:
    """ "a striped red circle" (count None) or "two red circles" (count 2)."""

    object: Object
    count: int | None = None

    def words(self) -> list[str]:
        thing = self.object
        words = ["a" if self.count is None else COUNTS[self.count - 1]]
        words += [word for word in (thing.texture, thing.color) if word is not None]
        words.append(thing.shape if self.count in (None, 1) else _PLURALS[thing.shape])
        return words


@dataclass(frozen=True, slots=True)
class Description:
    """One to three phrases; `relation`, if any, holds between the first two."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        words = self.phrases[0].words()
        for i, phrase in enumerate(self.phrases[1:]):
            words += _JOINS[self.relation] if i == 0 and self.relation is not None else ("and",)
            words += phrase.words()
        return " ".join(words)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What a picture must show: one claim a phrase, then the relation."""
        claims: list[Claim] = [
            Present(phrase.object) if phrase.count is None else Count(phrase.object, phrase.count)
            for phrase in self.phrases
        ]
        if self.relation is not None:
            first, second = self.phrases[:2]
            claims.append(Relation(first.object, self.relation, second.object))
        return tuple(claims)


def parse_caption(caption: str) -> Description:
    """The description that a caption states: the inverse of `Description.caption`.

    Raises UserError for an unknown word (naming the known ones) and for words in an order that the
    captions do not use.
    """
    words = caption.lower().split()
    known = VOCABULARY[len(SPECIAL_TOKENS) :]
    for word in words:
        if word not in known:
            raise UserError(f"caption word {word!r} is not known; known words: {' '.join(known)}")
    if len(words) >= MAX_TOKENS:
        raise UserError(
            f"caption {caption!r} has {len(words)} words; at most {MAX_TOKENS - 1} fit: shorten it"
        )
    phrases: list[Phrase] = []
    relation = None
    at = 0
    while True:
        phrase, at = _parse_phrase(words, at, caption)
        phrases.append(phrase)
        if at == len(words):
            break
        if len(phrases) == MAX_PHRASES:
            raise _bad(
                caption, f"{words[at]!r} stands after {MAX_PHRASES} objects, the most allowed"
            )
        joined, at = _parse_join(words, at, caption)
        if joined is not None and len(phrases) > 1:
            raise _bad(caption, f"{joined!r} may only stand between the first two objects")
        relation = relation or joined
    if relation is not None and any(phrase.count is not None for phrase in phrases):
        raise _bad(caption, f"objects of {relation!r} are each 'a ...', without a count")
    return Description(tuple(phrases), relation)


def _parse_phrase(words: Sequence[str], at: int, caption: str) -> tuple[Phrase, int]:
    def word() -> str:
        return words[at] if at < len(words) else "the end"

    if word() != "a" and word() not in COUNTS:
        raise _bad(caption, f"expected 'a' or one of {' '.join(COUNTS)} but found {word()!r}")
    count = None if word() == "a" else COUNTS.index(word()) + 1
    at += 1
    texture = color = None
    if word() in SAID_TEXTURES:
        texture, at = word(), at + 1
    if word() in COLORS:
        color, at = word(), at + 1
    forms = {shape: shape for shape in SHAPES} if count in (None, 1) else _SINGULARS
    if word() not in forms:
        raise _bad(caption, f"expected one of {' '.join(forms)} but found {word()!r}")
    return Phrase(Object(forms[word()], color, texture), count), at + 1


def _parse_join(words: Sequence[str], at: int, caption: str) -> tuple[str | None, int]:
    if words[at] == "and":
        return None, at + 1
    for relation, join in _JOINS.items():
        if tuple(words[at : at + len(join)]) == join:
            return relation, at + len(join)
    known = ", ".join("'" + " ".join(join) + "'" for join in _JOINS.values())
    raise _bad(caption, f"expected 'and' or {known} but found {words[at]!r}")


def _bad(caption: str, reason: str) -> UserError:
    return UserError(f"caption {caption!r} cannot be read: {reason}")


# What training never sees, a fifth or a sixth of each kind of composition: one fixed cell in each
# row of the table of pairs, so that every word still meets most of the others.

HELD_OUT_COLOR_SHAPES = frozenset(zip(COLORS, SHAPES, strict=False))  # 5 of 30
HELD_OUT_TEXTURE_SHAPES = frozenset(zip(SAID_TEXTURES, SHAPES[::2], strict=True))  # 3 of 15
HELD_OUT_COUNT_SHAPES = frozenset((i + 1, SHAPES[i + 1]) for i in range(len(COUNTS)))  # 4 of 20
HELD_OUT_SHAPE_PAIRS = frozenset(  # 2 of 10
    {frozenset(("circle", "triangle")), frozenset(("square", "diamond"))}
)


def canonical_relation(subject: str, relation: str, object: str) -> tuple[str, str, str]:
    """(shape, "left" or "above", shape): "a right of b" is the picture of "b left of a"."""
    if relation in ("left", "above"):
        return subject, relation, object
    return object, {"right": "left", "below": "above"}[relation], subject


# 7 of the 32 canonical triples whose shape pair is seen; the mirrored triple is always seen.
HELD_OUT_RELATIONS = frozenset(
    {
        ("circle", "left", "square"),
        ("cross", "left", "triangle"),
        ("diamond", "left", "circle"),
        ("square", "above", "cross"),
        ("triangle", "above", "square"),
        ("cross", "above", "diamond"),
        ("diamond", "above", "triangle"),
    }
)


def held_out(description: Description, drawn: Iterable[Object] = ()) -> frozenset[str]:
    """The kinds of held-out composition in a description and in the objects drawn for it.

    Kinds bear the names of the categories: "color" (colour, shape), "texture" (texture, shape),
    "shape" (two shapes in one picture), "numeracy" (count, shape), "spatial" (shape, relation,
    shape; as said, not as it happens to lie).
    """
    kinds = set()
    objects = [phrase.object for phrase in description.phrases]
    shapes = {thing.shape for thing in objects}
    if any(pair <= shapes for pair in HELD_OUT_SHAPE_PAIRS):
        kinds.add("shape")
    for thing in (*objects, *drawn):
        if (thing.color, thing.shape) in HELD_OUT_COLOR_SHAPES:
            kinds.add("color")
        if (thing.texture, thing.shape) in HELD_OUT_TEXTURE_SHAPES:
            kinds.add("texture")
    for phrase in description.phrases:
        if (phrase.count, phrase.object.shape) in HELD_OUT_COUNT_SHAPES:
            kinds.add("numeracy")
    if description.relation is not None:
        first, second = objects[0].shape, objects[1].shape
        if canonical_relation(first, description.relation, second) in HELD_OUT_RELATIONS:
            kinds.add("spatial")
    return frozenset(kinds)
