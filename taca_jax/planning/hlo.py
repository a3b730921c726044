"""Parses the text of a compiled program: computations, their instructions, sizes of arrays.

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
"""Instructions that do not change the value of a scalar."""


@dataclass(frozen=True)
class Shape:
    """One array: its dimensions, the bits of an element, and whether it is in HBM, the main memory,
    or in one of the chip's own memories."""

    dimensions: tuple[int, ...]
    bits: int
    in_main_memory: bool

    @property
    def size(self) -> int:
        """Bytes, without tile padding."""
        return math.prod(self.dimensions) * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction, a line of the text.

    shapes: of its result, flattened. number: the index of a parameter, or the value of an integer
    constant. rest: its attributes, as text.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool
    number: int | None = None

    def attribute(self, name: str) -> str:
        """The value of an attribute, a number or the name of a computation; "" if it is absent."""
        found = re.search(rf"\b{name}=%?([^\s,}}]+)", self.rest)
        return "" if found is None else found[1]

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs once, so without the body of a loop."""
        if self.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
            if branches is not None:
                return tuple(_OPERAND.findall(branches[1]))
            names = ("true_computation", "false_computation")
        elif self.opcode == "custom-call-start":
            listed = re.search(r"called_computations=\{([^}]*)\}", self.rest)
            return () if listed is None else tuple(_OPERAND.findall(listed[1]))
        else:
            names = ("to_apply" if self.opcode == "call" else "calls",)
        return tuple(filter(None, map(self.attribute, names)))


@dataclass(frozen=True)
class Program:
    """Computations by name, with their instructions in the order of execution.

    entry: the name of the computation that runs first. instructions: all, by name. chips: how many
    run the program together.
    """

    computations: Mapping[str, Sequence[Instruction]]
    entry: str
    instructions: Mapping[str, Instruction]
    chips: int

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Parses a program's text. Raises ValueError unless it is that of a scheduled module."""
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
        """How often a loop's body runs, from its annotation or, without one, from its counter.

        Raises LookupError if neither can be read.
        """
        if (known := _TRIPS.search(loop.rest)) is not None:
            return int(known[1])
        condition = self._root(loop.attribute("condition"))
        last = self._value(condition.operands[-1])
        counter = self.instructions[condition.operands[0]]
        if condition.attribute("direction") != "LT" or counter.opcode != "get-tuple-element":
            last = None
        index = int(counter.attribute("index") or 0)
        first = self._value(self._element(loop.operands[0], index))
        step = self._step(self._root(loop.attribute("body")), index)
        if last is None or first is None or step is None:
            raise LookupError(f"the loop {loop.name} does not say how often it runs")
        return max(0, -((first - last) // step))

    def _root(self, name: str) -> Instruction:
        return next(each for each in self.computations[name] if each.is_root)

    def _element(self, name: str, index: int) -> str:
        """The instruction that gives an element of a tuple."""
        made = self.instructions[name]
        return made.operands[index] if made.opcode == "tuple" else name

    def _value(self, name: str) -> int | None:
        """The value of an instruction's result, if it is a constant."""
        each = self.instructions[name]
        while each.opcode in _SAME:
            each = self.instructions[each.operands[0]]
        return each.number if each.opcode == "constant" else None

    def _step(self, end: Instruction, index: int) -> int | None:
        """The increment of a loop's counter, an element of the body's result `end`."""
        if end.opcode != "tuple":
            return None
        grown = self.instructions[end.operands[index]]
        if grown.opcode == "fusion":
            grown = self._root(grown.called[0])
        if grown.opcode != "add":
            return None
        return next(filter(None, map(self._value, grown.operands)), None)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    shapes, text = tuple(_shapes(text[:end])), text[end:].lstrip()
    opcode, _, text = text.partition("(")
    if opcode == "constant":  # an array's values may continue over many lines
        value = re.match(r"(-?\d+)\)", text)
        number = None if value is None else int(value[1])
        return Instruction(name, shapes, opcode, (), text, is_root, number)
    end = _closing("(" + text) - 1
    number = int(text[:end]) if opcode == "parameter" else None
    operands = tuple(_OPERAND.findall(text[:end]))
    return Instruction(name, shapes, opcode, operands, text[end + 1 :], is_root, number)


def _closing(text: str) -> int:
    """The position where the parenthesis at the start of `text` is closed."""
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
            # S(1) is vector memory; others are for scalars and semaphores.
            re.search(r"S\([1-9]", layout) is None,
        )
