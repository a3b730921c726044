"""What a compiled step moves: over the wires between chips, and to and from each chip's memory.

Read from the program itself, everything within a scanned loop as often as the loop runs. Whether
collectives hide behind arithmetic is found by following the schedule: the wires and the chip's
units each do one thing after the other, an asynchronous collective is on its way from its start on,
and the units wait for it at its end. How long the units take for each instruction is what the
compiler itself reckons with; it has no figure for kernels of our own, which count as nothing here,
so that somewhat more is hidden than this says.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from taca_jax.planning.hlo import Instruction, Program, Shape
from taca_jax.planning.slices import Chip

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
        *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
    }
)
"""Instructions that move nothing themselves."""
_HANDED_ON = frozenset({"tuple", *KINDS})
"""What a fusion hands on without touching it: collectives are counted once, when they arrive."""
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Moved:
    """Collectives of one kind in a step: how many, bytes that each chip receives, and of those the
    bytes that move asynchronously."""

    count: int = 0
    received: float = 0.0
    asynchronous: float = 0.0

    @property
    def asynchronous_share(self) -> float:
        """Of the bytes."""
        return self.asynchronous / self.received if self.received else 0.0

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(
            self.count + other.count,
            self.received + other.received,
            self.asynchronous + other.asynchronous,
        )

    def __mul__(self, times: int) -> "Moved":
        return Moved(self.count * times, self.received * times, self.asynchronous * times)


@dataclass(frozen=True)
class Traffic:
    """What one chip does in a step, or in a part of it.

    collectives: by kind. memory: bytes read from and written to its main memory. seconds: that its
    schedule takes, by the compiler's reckoning, and waited: of those the ones in which its units
    wait for the wires.
    """

    collectives: Mapping[str, Moved] = field(default_factory=dict)
    memory: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def together(self) -> Moved:
        """Collectives of all kinds."""
        return sum(self.collectives.values(), Moved())

    def __add__(self, other: "Traffic") -> "Traffic":
        """One after the other."""
        kinds = {**self.collectives, **other.collectives}
        found = {
            k: self.collectives.get(k, Moved()) + other.collectives.get(k, Moved()) for k in kinds
        }
        return Traffic(
            found,
            self.memory + other.memory,
            self.seconds + other.seconds,
            self.waited + other.waited,
        )

    def __mul__(self, times: int) -> "Traffic":
        collectives = {kind: moved * times for kind, moved in self.collectives.items()}
        return Traffic(collectives, self.memory * times, self.seconds * times, self.waited * times)


def read_traffic(text: str, chip: Chip) -> Traffic:
    """The traffic of a compiled program, given as its text.

    Raises LookupError where the program does not say how often a loop runs or between how many
    chips a collective is, and ValueError for a text that is no scheduled program.
    """
    program = Program.parse(text)
    return _Reader(program, chip).of(program.entry)


@dataclass
class _UnderWay:
    """When the wires are done with all that was sent, and when each asynchronous collective has
    arrived, by channel; in seconds of the computation's own clock."""

    wires: float = 0.0
    arrivals: dict[str, float] = field(default_factory=dict)

    def send(self, now: float, seconds: float) -> float:
        """When something arrives that takes so long."""
        self.wires = max(now, self.wires) + seconds
        return self.wires

    def restart(self, end: float) -> None:
        """Sets the clock, which is at `end`, to zero."""
        self.wires = max(self.wires - end, 0.0)
        self.arrivals = {channel: max(at - end, 0.0) for channel, at in self.arrivals.items()}


class _Reader:
    def __init__(self, program: Program, chip: Chip):
        self.program = program
        self.chip = chip
        self.seen: dict[str, Traffic] = {}
        self.asynchronous = {
            _channel(collective)
            for instruction in program.instructions.values()
            for step, collective in self._collectives(instruction)
            if step == "start"
        }

    def of(self, name: str) -> Traffic:
        """The traffic of one run of a computation; of a loop's body, of one after others."""
        if name not in self.seen:
            under_way = _UnderWay()
            self.seen[name] = self._follow(name, under_way)
            if under_way.arrivals:  # what is started in one turn and awaited in the next
                self.seen[name] = self._follow(name, under_way)
        return self.seen[name]

    def _follow(self, name: str, under_way: "_UnderWay") -> Traffic:
        total = Traffic()  # whose seconds are when the units are done with what they have
        for instruction in self.program.computations[name]:
            if instruction.opcode == "while":
                body = instruction.attribute("body")
                assert body is not None
                total += self.of(body) * self.program.trips(instruction)
            elif instruction.opcode in ("call", "conditional"):
                # Of branches one runs: no more than all of them.
                total += sum(map(self.of, instruction.called), Traffic())
            else:
                until = 0.0
                for step, collective in self._collectives(instruction):
                    channel = _channel(collective)
                    if step == "done":
                        until = max(until, under_way.arrivals.pop(channel, 0.0))
                    elif step == "start" or channel not in self.asynchronous:
                        kind, received = self._received(collective, instruction)
                        on_its_way = received if step == "start" else 0.0
                        # Results of a start are what is sent, what arrives, and flags.
                        arriving = instruction.shapes[step == "start" :][:1]
                        written = received if _main(arriving) else 0.0
                        total += Traffic({kind: Moved(1, received, on_its_way)}, written)
                        arrival = under_way.send(total.seconds, received / self.chip.wire_bandwidth)
                        if step == "start":
                            under_way.arrivals[channel] = arrival
                        else:
                            until = max(until, arrival)
                late = max(until - total.seconds, 0.0)
                cycles = _CYCLES.search(instruction.rest)
                busy = 0.0 if cycles is None else int(cycles[1]) / self.chip.clock
                total += Traffic({}, self._memory(instruction), late + busy, late)
        under_way.restart(total.seconds)
        return total

    def _collectives(self, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """The collectives in an instruction, each with "start" or "done" where it is only that.

        An asynchronous one that goes on beside other work is in each instruction with such work.
        """
        base, _, end = instruction.opcode.rpartition("-")
        if instruction.opcode in KINDS:
            yield "", instruction
        elif base in KINDS:
            start = instruction
            if end == "done":
                start = self.program.instructions[instruction.operands[0]]
            yield end, start
        elif instruction.opcode == "fusion":
            inside = self.program.computations[instruction.called[0]]
            targets = {each.attribute("custom_call_target") for each in inside}
            starts, ends = (f'"AsyncCollective{which}"' in targets for which in ("Start", "Done"))
            for each in inside:
                if each.opcode in KINDS:
                    yield "start" if starts else "done" if ends else "", each

    def _received(self, collective: Instruction, within: Instruction) -> tuple[str, float]:
        """Its kind and the bytes that a chip receives by it, by the shortest way."""
        kind = collective.opcode.removesuffix("-start")
        if kind == "all-reduce" and "all-reduce-scatter" in within.name:
            kind = "reduce-scatter"  # as the compiler writes it: all are summed, a part is kept
        given = [self.program.instructions[name].shapes for name in collective.operands]
        if kind == "collective-permute":
            return kind, sum(shape.size for shape in given[0])
        size = sum(shape.size for shapes in given for shape in shapes)
        n = _group(collective, self.program.chips)
        return kind, size * {
            "all-gather": n - 1,
            "reduce-scatter": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "all-to-all": (n - 1) / n,
        }[kind]

    def _memory(self, instruction: Instruction) -> float:
        """Bytes that an instruction reads from the main memory and writes to it."""
        kind, _, end = instruction.opcode.rpartition("-")
        if instruction.opcode in _FREE or end == "done" or kind in KINDS:
            return 0.0
        if end == "start":  # results are both its ends, and flags
            return float(_main(instruction.shapes[:2]))
        given = [self.program.instructions[name].shapes for name in instruction.operands]
        if instruction.opcode == "fusion":
            inside = self.program.computations[instruction.called[0]]
            if any(each.is_root and "AsyncCollective" in each.rest for each in inside):
                return 0.0
            read = sum(
                min(_main(given[each.number or 0]), self._used(each.name, inside))
                for each in inside
                if each.opcode == "parameter"
            )
            return read + self._written(inside, instruction)
        if instruction.opcode in _SLICES:
            return 2.0 * _main(instruction.shapes)
        if instruction.opcode == "dynamic-update-slice":
            return 2.0 * _main(given[1])
        return float(sum(map(_main, given)) + _main(instruction.shapes))

    def _used(self, name: str, inside: Sequence[Instruction]) -> float:
        """Bytes that a computation reads of one of its parameters: of slices, what they take."""
        used = 0.0
        for each in inside:
            if name not in each.operands:
                continue
            if each.opcode in _SLICES:
                used += sum(shape.size for shape in each.shapes)
            elif each.opcode == "bitcast":
                used += self._used(each.name, inside)
            elif each.opcode == "fusion":
                further = self.program.computations[each.called[0]]
                number = each.operands.index(name)
                used += sum(
                    self._used(one.name, further)
                    for one in further
                    if one.opcode == "parameter" and one.number == number
                )
            elif not (
                each.opcode in _HANDED_ON
                or (each.opcode == "dynamic-update-slice" and each.operands[0] == name)
                or "AsyncCollective" in each.rest
            ):
                return math.inf
        return used

    def _written(self, inside: Sequence[Instruction], fusion: Instruction) -> float:
        """Bytes that a fusion writes: where it puts a part into what is there, the part."""
        root = next(each for each in inside if each.is_root)
        ends = root.operands if root.opcode == "tuple" else (root.name,)
        if len(ends) != len(fusion.shapes):
            return float(_main(fusion.shapes))
        written = 0.0
        for name, shape in zip(ends, fusion.shapes, strict=True):
            end = self.program.instructions[name]
            while end.opcode == "bitcast":
                end = self.program.instructions[end.operands[0]]
            size = float(_main((shape,)))
            if end.opcode == "parameter" or end.opcode in KINDS:
                size = 0.0
            if end.opcode == "dynamic-update-slice":
                part = self.program.instructions[end.operands[1]].shapes
                size = min(size, sum(each.size for each in part))
            written += size
        return written


def _channel(collective: Instruction) -> str:
    """What all instructions of one collective have in common."""
    return collective.attribute("channel_id") or collective.name


def _main(shapes: Sequence[Shape]) -> int:
    """Bytes of those in the main memory."""
    return sum(shape.size for shape in shapes if shape.in_main_memory)


def _group(collective: Instruction, chips: int) -> int:
    """Between how many chips a collective is.

    Raises LookupError for a way of saying so that is not known.
    """
    text = collective.rest.partition("replica_groups=")[2]
    if (mesh := re.match(r"mesh\[([^\]]*)\] ?\{([^}]*)\}", text)) is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if (iota := re.match(r"\[\d+,(\d+)\]<=", text)) is not None:
        return int(iota[1])
    if (listed := re.match(r"\{(?:\{([\d,]+)\})?", text)) is not None:
        return chips if listed[1] is None else len(listed[1].split(","))
    raise LookupError(f"{collective.name} does not say between how many chips it is: {text[:80]}")
