"""A compiled program's text, taken apart: computations, their instructions, sizes of arrays.

Source: the text form of HLO, openxla.org/xla/operation_semantics, as libtpu prints scheduled
modules.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*)$")
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([^\s,()]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = ("copy", "bitcast", "convert", "reshape")
"""Instructions that hand a number on."""


@dataclass(frozen=True)
class Shape:
    """One array: its dimensions, the bits of an element, and whether it lies in the main memory,
    as most do, or in one of the chip's own."""

    dimensions: tuple[int, ...]
    bits: int
    in_main_memory: bool

    @property
    def size(self) -> int:
        """Bytes, without the padding of tiles."""
        return math.prod(self.dimensions) * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line. shapes: of its result, flat. number: which parameter it is, or a whole constant's
    value. rest: its attributes, as text."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool
    number: int | None = None

    def attribute(self, name: str) -> str | None:
        """The computation or the number that an attribute names."""
        found = re.search(rf"\b{name}=%?([^\s,}}]+)", self.rest)
        return None if found is None else found[1]

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs once; a loop's body is not among them."""
        if self.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
            if branches is not None:
                return tuple(_OPERAND.findall(branches[1]))
            names = (self.attribute("true_computation"), self.attribute("false_computation"))
            return tuple(name for name in names if name is not None)
        name = self.attribute("to_apply" if self.opcode == "call" else "calls")
        return () if name is None else (name,)


@dataclass(frozen=True)
class Program:
    """Computations by name, their instructions in the order in which they run; one is the entry.

    instructions: all, by name. chips: on how many it runs as one.
    """

    computations: Mapping[str, Sequence[Instruction]]
    entry: str
    instructions: Mapping[str, Instruction]
    chips: int

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Raises ValueError for a text that is no scheduled module's."""
        first = text.partition("\n")[0]
        if "is_scheduled=true" not in first:
            raise ValueError("the program's text does not say that it is scheduled")
        chips = re.search(r"num_partitions=(\d+)", first)
        computations: dict[str, list[Instruction]] = {}
        entry, inside = "", None
        for line in text.splitlines():
            if inside is None:
                if (head := _COMPUTATION.match(line)) is not None:
                    inside = computations[head[2]] = []
                    entry = head[2] if head[1] else entry
            elif line.startswith("}"):
                inside = None
            elif (found := _INSTRUCTION.match(line)) is not None:
                inside.append(_instruction(found[2], found[3], is_root=found[1] is not None))
        named = {each.name: each for inside in computations.values() for each in inside}
        return cls(computations, entry, named, 1 if chips is None else int(chips[1]))

    def trips(self, loop: Instruction) -> int:
        """How often a loop's body runs: as the program says, or as its counter does.

        Raises LookupError where neither can be read.
        """
        if (known := _TRIPS.search(loop.rest)) is not None:
            return int(known[1])
        condition = self._root(loop.attribute("condition"))
        last = self._value(condition.operands[-1])
        counter = self.instructions[condition.operands[0]]
        if condition.attribute("direction") != "LT" or counter.opcode != "get-tuple-element":
            last = None
        place = int(counter.attribute("index") or 0)
        first = self._value(self._element(loop.operands[0], place))
        step = self._step(self._root(loop.attribute("body")), place)
        if last is None or first is None or step is None:
            raise LookupError(f"the loop {loop.name} does not say how often it runs")
        return max(0, -((first - last) // step))

    def _root(self, name: str | None) -> Instruction:
        assert name is not None
        return next(each for each in self.computations[name] if each.is_root)

    def _element(self, name: str, place: int) -> str:
        """What a tuple has at a place."""
        made = self.instructions[name]
        return made.operands[place] if made.opcode == "tuple" else name

    def _value(self, name: str) -> int | None:
        """The number that an instruction is known to give."""
        each = self.instructions[name]
        while each.opcode in _SAME:
            each = self.instructions[each.operands[0]]
        return each.number if each.opcode == "constant" else None

    def _step(self, end: Instruction, place: int) -> int | None:
        """What a loop's counter grows by."""
        if end.opcode != "tuple":
            return None
        grown = self.instructions[end.operands[place]]
        if grown.opcode == "fusion":
            grown = self._root(grown.called[0])
        if grown.opcode != "add":
            return None
        return next(filter(None, map(self._value, grown.operands)), None)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    shapes, text = tuple(_shapes(text[:end])), text[end:].lstrip()
    opcode, _, text = text.partition("(")
    if opcode == "constant":  # an array's numbers may go on over many lines
        value = re.match(r"(-?\d+)\)", text)
        number = None if value is None else int(value[1])
        return Instruction(name, shapes, opcode, (), text, is_root, number)
    end = _closing("(" + text) - 1
    number = int(text[:end]) if opcode == "parameter" else None
    operands = tuple(_OPERAND.findall(text[:end]))
    return Instruction(name, shapes, opcode, operands, text[end + 1 :], is_root, number)


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _shapes(text: str) -> Iterator[Shape]:
    for kind, dimensions, layout in _ARRAY.findall(text):
        bits = re.match(r"[a-z]+(\d+)", kind)
        yield Shape(
            tuple(map(int, filter(None, dimensions.split(",")))),
            8 if bits is None else int(bits[1]),
            # S(1) is the vector memory, others are scalars' and semaphores'.
            re.search(r"S\([1-9]", layout) is None,
        )
