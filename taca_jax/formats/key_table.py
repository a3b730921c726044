"""Key tables: map tensors of another layout to our parameters, and convert their contents.

"Theirs" is the other layout, "ours" this package's."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from taca_jax.formats.tensor_files import Shape

LAYER = "layer"


@dataclass(frozen=True)
class Transform:
    """Converts a tensor from their layout (`load`), and back (`store`)."""

    load: Callable[[np.ndarray], np.ndarray]
    store: Callable[[np.ndarray], np.ndarray]

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape in their layout of an array that has `shape` in ours."""
        return self.store(np.broadcast_to(np.False_, shape)).shape


def swap_halves(x: np.ndarray) -> np.ndarray:
    """The two halves of the first axis, exchanged."""
    return np.roll(x, x.shape[0] // 2, axis=0)


KEEP = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(np.transpose, np.transpose)
"""PyTorch's Linear `[out, in]`, ours `[in, out]`."""
CONVOLUTION = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""PyTorch's OIHW, ours HWIO."""
SWAP_HALVES = Transform(swap_halves, swap_halves)
TRANSPOSE_SWAPPED = Transform(lambda x: swap_halves(x).T, lambda x: swap_halves(x.T))
POINTWISE = Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
"""PyTorch's 1 x 1 convolution `[out, in, 1, 1]`, our Linear `[in, out]`."""


@dataclass(frozen=True)
class Rule:
    """One line of a table: `ours` is `transform` applied to `theirs`.

    `{name}` in both is a number that is the same in both. `{layer}` in `theirs` only is the index
    of a layer in a parameter of ours that stacks layers along its first axis.
    part: `theirs` is the concatenation of several of ours along its first axis, in order of `part`.
    layers: the stack `ours` holds only these of their layers; None: all.
    """

    theirs: str
    ours: str
    transform: Transform = KEEP
    part: int | None = None
    layers: range | None = None

    @property
    def stacked(self) -> bool:
        return f"{{{LAYER}}}" in self.theirs and f"{{{LAYER}}}" not in self.ours

    @cached_property
    def their_pattern(self) -> re.Pattern[str]:
        return _pattern(self.theirs)

    @cached_property
    def our_pattern(self) -> re.Pattern[str]:
        return _pattern(self.ours)


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs, of `shape`, for one of our parameters, or one layer of a stacked one.

    rows: the rows of the tensor that belong to this parameter; None: all.
    """

    key: str
    path: str
    layer: int | None
    shape: Shape
    transform: Transform
    rows: slice | None = None


@dataclass(frozen=True)
class Target:
    """The parameter of ours that a key of theirs belongs to, or one layer of a stacked one."""

    path: str
    layer: int | None
    transform: Transform


@dataclass(frozen=True)
class Table:
    """A layout.

    name: for messages. ignored: regular expressions of whole keys that are not needed, such as
    copies of other tensors.
    """

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """Every tensor that a model with parameters of these shapes has in this layout.

        Raises LookupError if not exactly one rule matches a parameter, which is a bug in the table.
        """
        parts: dict[str, list[tuple[int, Piece]]] = {}
        for path, shape in shapes.items():
            rules = [(r, m) for r in self.rules if (m := r.our_pattern.fullmatch(path))]
            if len(rules) != 1:
                raise LookupError(f"{len(rules)} rules of {self.name} are about {path}")
            ((rule, match),) = rules
            layers = range(shape[0]) if rule.stacked else (None,)
            stored = rule.transform.stored_shape(shape[1:] if rule.stacked else shape)
            for layer in layers:
                number = layer if rule.layers is None or layer is None else rule.layers[layer]
                key = rule.theirs.format(**{LAYER: number, **match.groupdict()})
                piece = Piece(key, path, layer, stored, rule.transform)
                if rule.part is None:
                    yield piece
                else:
                    parts.setdefault(key, []).append((rule.part, piece))
        for fused in parts.values():
            yield from _fused([piece for _, piece in sorted(fused, key=lambda each: each[0])])

    def find(self, key: str) -> tuple[Target, ...]:
        """The targets of one key of theirs, in order of their parts; empty if it has none."""
        matches = [
            (r, m)
            for r in self.rules
            if (m := r.their_pattern.fullmatch(key))
            and (r.layers is None or int(m[LAYER]) in r.layers)
        ]
        return tuple(
            Target(
                rule.ours.format(**match.groupdict()),
                int(match[LAYER]) - (rule.layers or range(1)).start if rule.stacked else None,
                rule.transform,
            )
            for rule, match in sorted(matches, key=lambda each: each[0].part or 0)
        )

    def is_ignored(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)


def linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """The rules of a PyTorch Linear: kernel and bias."""
    return (
        Rule(f"{theirs}.weight", f"{ours}.kernel", TRANSPOSE),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    )


def fused_linear(theirs: str, *ours: str) -> tuple[Rule, ...]:
    """The rules of one PyTorch Linear that is several of ours, with concatenated outputs."""
    return tuple(
        replace(rule, part=part) for part, path in enumerate(ours) for rule in linear(theirs, path)
    )


def convolution(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """The rules of a PyTorch Conv2d: kernel and bias."""
    return (
        Rule(f"{theirs}.weight", f"{ours}.kernel", CONVOLUTION),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    )


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """The rules of a normalisation: scale and bias."""
    return Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")


def _fused(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces of one fused tensor, each with its rows and the shape of the whole tensor."""
    stops = list(accumulate(piece.shape[0] for piece in pieces))
    for piece, stop in zip(pieces, stops, strict=True):
        rows = slice(stop - piece.shape[0], stop)
        yield replace(piece, shape=(stops[-1], *piece.shape[1:]), rows=rows)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))
