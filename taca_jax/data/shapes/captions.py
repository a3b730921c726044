"""Captions of the shapes data: what they describe, and which compositions are held out.

A `Description` says what a picture must show. Its `caption` is the text for the model, its `claims`
are what the evaluation checks, and `parse_caption` turns a caption back into its description. The
categories follow T2I-CompBench (Huang et al., 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from taca_jax.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "cyan", "purple")
PLAIN = "plain"  # the texture of objects whose texture is not said; captions never say "plain"
SAID_TEXTURES = ("striped", "dotted", "checkered")
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
    """An object in a picture or a caption; None is an attribute that the caption leaves open."""

    shape: str
    color: str | None = None
    texture: str | None = None

    def matches(self, other: "Object") -> bool:
        """Whether `other`, an object in a picture, fits this description of one."""
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
    """One of the objects that fit `subject` is left of (or ...) one of those that fit `object`."""

    subject: Object
    relation: str
    object: Object


Claim = Present | Count | Relation


@dataclass(frozen=True, slots=True)
class Phrase:
    """A part of a caption: "a striped red circle" (count None) or "two red circles" (count 2)."""

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
    """One to three phrases, and the relation between the first two objects, if any."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        words: list[str] = []
        for joined, phrase in zip(self.joins, self.phrases, strict=True):
            words += [*joined, *phrase.words()]
        return " ".join(words)

    @property
    def joins(self) -> tuple[tuple[str, ...], ...]:
        """The words before each phrase: none, those of the relation or "and", and then "and"."""
        second = ("and",) if self.relation is None else _JOINS[self.relation]
        return ((), second, *(("and",),) * MAX_PHRASES)[: len(self.phrases)]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What a picture must show: a claim for each phrase, then the relation."""
        claims: list[Claim] = [
            Present(phrase.object) if phrase.count is None else Count(phrase.object, phrase.count)
            for phrase in self.phrases
        ]
        if self.relation is not None:
            first, second = self.phrases[:2]
            claims.append(Relation(first.object, self.relation, second.object))
        return tuple(claims)


def parse_caption(caption: str) -> Description:
    """The description with this caption; the inverse of `Description.caption`.

    Raises UserError for an unknown word, naming the known ones, and for words in an order that no
    caption has.
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
    """The phrase that begins at word `at`, and the number of the word behind it."""

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
    """The relation (None for "and") at word `at`, and the number of the word behind it."""
    if words[at] == "and":
        return None, at + 1
    for relation, join in _JOINS.items():
        if tuple(words[at : at + len(join)]) == join:
            return relation, at + len(join)
    known = ", ".join("'" + " ".join(join) + "'" for join in _JOINS.values())
    raise _bad(caption, f"expected 'and' or {known} but found {words[at]!r}")


def _bad(caption: str, reason: str) -> UserError:
    return UserError(f"caption {caption!r} cannot be read: {reason}")


# The compositions that training never sees, a fifth or a sixth of each kind. In a table of pairs it
# is at most one in each row, so that training sees every word with most of the others.

HELD_OUT_COLOR_SHAPES = frozenset(zip(COLORS, SHAPES, strict=False))  # 5 of 30
HELD_OUT_TEXTURE_SHAPES = frozenset(zip(SAID_TEXTURES, SHAPES[::2], strict=True))  # 3 of 15
HELD_OUT_COUNT_SHAPES = frozenset((i + 1, SHAPES[i + 1]) for i in range(len(COUNTS)))  # 4 of 20
HELD_OUT_SHAPE_PAIRS = frozenset(  # 2 of 10
    {frozenset(("circle", "triangle")), frozenset(("square", "diamond"))}
)


def canonical_relation(subject: str, relation: str, object: str) -> tuple[str, str, str]:
    """(shape, "left" or "above", shape), the same for "a right of b" and "b left of a"."""
    if relation in ("left", "above"):
        return subject, relation, object
    return object, {"right": "left", "below": "above"}[relation], subject


# 7 of the 32 canonical triples whose pair of shapes is seen; mirrored triples are never held out.
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


def held_out(description: Description) -> frozenset[str]:
    """The kinds of held-out compositions in a description, by the names of the categories.

    "color" is a pair of colour and shape, "texture" of texture and shape, "shape" of two shapes in
    one picture, "numeracy" of count and shape; "spatial" is a shape in a relation to another, where
    the caption says so, not where objects happen to lie so.
    """
    kinds = set()
    objects = [phrase.object for phrase in description.phrases]
    shapes = {thing.shape for thing in objects}
    if any(pair <= shapes for pair in HELD_OUT_SHAPE_PAIRS):
        kinds.add("shape")
    for thing in objects:
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
