"""The bytes that a compiled step moves between chips, and to and from each chip's memory.

They are read from the program's text, with the body of a loop counted as often as the loop runs.
Following the schedule shows which collectives overlap with compute: the wires and the chip's
compute units each do one thing after the other, an asynchronous collective is under way from its
start, and the units wait for it at its end. The time of each instruction is the compiler's own
estimate. That of our kernels follows from what they say of themselves: FLOPs, at
`Chip.attention_share` of the peak, or bytes, whichever takes longer.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from taca_jax.planning.hlo import Instruction, Program, Shape
from taca_jax.planning.slices import Chip

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL_FLOPS, _KERNEL_BYTES = (
    re.compile(rf'"cost_estimate":\s*\{{[^}}]*"{what}":\s*"?(\d+)')
    for what in ("flops", "bytes_accessed")
)

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
        *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
    }
)
"""Instructions that move no data themselves."""
_HANDED_ON = frozenset({"tuple", *KINDS})
"""Operations in a fusion that only pass data on: collectives are counted once, on arrival."""
_CALL = "custom-call"
"""What the opcodes of an asynchronous call begin with."""
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Moved:
    """Collectives of one kind in a step: their number, the bytes that each chip receives, and how
    many of those move asynchronously."""

    count: int = 0
    received: float = 0.0
    asynchronous: float = 0.0

    @property
    def asynchronous_share(self) -> float:
        """The share of the received bytes that move asynchronously."""
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

    collectives: by kind. memory: bytes read from and written to HBM. seconds: the schedule's time,
    by the compiler's estimates. waited: the part of it in which the compute units wait for wires.
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
        """The traffic of two parts that run one after the other."""
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

    Raises LookupError if the text does not say how often a loop runs or how many chips take part in
    a collective, and ValueError unless it is a scheduled program.
    """
    program = Program.parse(text)
    return Reader(program, chip).of(program.entry)


@dataclass
class _UnderWay:
    """Collectives under way: when the wires will be free again, and when each asynchronous
    collective will have arrived, by channel; in seconds from the computation's start."""

    wires: float = 0.0
    arrivals: dict[str, float] = field(default_factory=dict)

    def send(self, now: float, seconds: float) -> float:
        """Sends something that takes `seconds` on the wires, and returns when it arrives."""
        self.wires = max(now, self.wires) + seconds
        return self.wires

    def restart(self, end: float) -> None:
        """Makes the time `end` the new time zero."""
        self.wires = max(self.wires - end, 0.0)
        self.arrivals = {channel: max(at - end, 0.0) for channel, at in self.arrivals.items()}


class Reader:
    """Reads one program, part by part."""

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
        """The traffic of one run of a computation; for a loop's body, of an iteration that follows
        another."""
        if name not in self.seen:
            under_way = _UnderWay()
            self.seen[name] = self._follow(name, under_way)
            if under_way.arrivals:  # started in one iteration, awaited in the next
                self.seen[name] = self._follow(name, under_way)
        return self.seen[name]

    def _follow(self, name: str, under_way: "_UnderWay") -> Traffic:
        total = Traffic()  # its seconds are the units' clock
        for instruction in self.program.computations[name]:
            if instruction.opcode == "while":
                body = self.of(instruction.attribute("body"))
                total += body * self.program.trips(instruction)
            elif instruction.opcode in ("call", "conditional"):
                # Only one branch runs; the sum is an upper bound.
                total += sum(map(self.of, instruction.called), Traffic())
            else:
                until = 0.0
                for step, collective in self._collectives(instruction):
                    channel = _channel(collective)
                    if step == "done":
                        until = max(until, under_way.arrivals.pop(channel, 0.0))
                    elif step == "start" or channel not in self.asynchronous:
                        kind, received = self._received(collective, instruction)
                        asynchronous = received if step == "start" else 0.0
                        # The results of a start are the operand, the result, and flags.
                        arriving = instruction.shapes[step == "start" :][:1]
                        written = received if _hbm_bytes(arriving) else 0.0
                        total += Traffic({kind: Moved(1, received, asynchronous)}, written)
                        arrival = under_way.send(total.seconds, received / self.chip.wire_bandwidth)
                        if step == "start":
                            under_way.arrivals[channel] = arrival
                        else:
                            until = max(until, arrival)
                late = max(until - total.seconds, 0.0)
                busy = self.seconds(instruction)
                total += Traffic({}, self.memory(instruction), late + busy, late)
        under_way.restart(total.seconds)
        return total

    def seconds(self, instruction: Instruction) -> float:
        """How long the compute units take for an instruction."""
        if (cycles := _CYCLES.search(instruction.rest)) is not None:
            return int(cycles[1]) / self.chip.clock
        if instruction.opcode != "custom-call":
            return 0.0
        flops, moved = kernel_flops(instruction) or 0.0, _said(_KERNEL_BYTES, instruction) or 0.0
        return max(
            flops / (self.chip.flops * self.chip.attention_share),
            moved / self.chip.memory_bandwidth,
        )

    def _collectives(self, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """The collectives in an instruction, each with "start" or "done", or "" if synchronous.

        An asynchronous collective that is fused with other work appears in each such instruction.
        One that a SparseCore carries out is a call, which gets its operands by an update.
        """
        base, _, end = instruction.opcode.rpartition("-")
        if instruction.opcode in KINDS:
            yield "", instruction
        elif base == _CALL and end in ("update", "done"):
            for called in self._call(instruction).called:
                for each in self.program.computations[called]:
                    if each.opcode in KINDS:
                        yield "start" if end == "update" else "done", each
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

    def _call(self, instruction: Instruction) -> Instruction:
        """The start of an asynchronous call, from its update or its end."""
        while not instruction.opcode.endswith("-start"):
            instruction = self.program.instructions[instruction.operands[0]]
        return instruction

    def _received(self, collective: Instruction, within: Instruction) -> tuple[str, float]:
        """The kind of a collective and the bytes that a chip receives by the optimal algorithm."""
        kind = collective.opcode.removesuffix("-start")
        if kind == "all-reduce" and "all-reduce-scatter" in within.name:
            kind = "reduce-scatter"  # the compiler's form of it: an all-reduce and a slice
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

    def memory(self, instruction: Instruction) -> float:
        """Bytes that an instruction reads from HBM and writes to it."""
        kind, _, end = instruction.opcode.rpartition("-")
        if instruction.opcode in _FREE or end == "done" or kind in (*KINDS, _CALL):
            return 0.0
        if end == "start":  # its results are operand, result, and flags
            return float(_hbm_bytes(instruction.shapes[:2]))
        given = [self.program.instructions[name].shapes for name in instruction.operands]
        if instruction.opcode == "fusion":
            inside = self.program.computations[instruction.called[0]]
            if any(each.is_root and "AsyncCollective" in each.rest for each in inside):
                return 0.0
            read = sum(
                min(_hbm_bytes(given[each.number or 0]), self._used(each.name, inside))
                for each in inside
                if each.opcode == "parameter"
            )
            return read + self._written(inside, instruction)
        if instruction.opcode in _SLICES:
            return 2.0 * _hbm_bytes(instruction.shapes)
        if instruction.opcode == "dynamic-update-slice":
            return 2.0 * _hbm_bytes(given[1])
        return float(sum(map(_hbm_bytes, given)) + _hbm_bytes(instruction.shapes))

    def _used(self, name: str, inside: Sequence[Instruction]) -> float:
        """Bytes that a computation reads of one of its parameters; a slice reads only its part."""
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
        """Bytes that a fusion writes; an update in place writes only the updated part."""
        root = next(each for each in inside if each.is_root)
        ends = root.operands if root.opcode == "tuple" else (root.name,)
        if len(ends) != len(fusion.shapes):
            return float(_hbm_bytes(fusion.shapes))
        written = 0.0
        for name, shape in zip(ends, fusion.shapes, strict=True):
            end = self.program.instructions[name]
            while end.opcode == "bitcast":
                end = self.program.instructions[end.operands[0]]
            size = float(_hbm_bytes((shape,)))
            if end.opcode == "parameter" or end.opcode in KINDS:
                size = 0.0
            if end.opcode == "dynamic-update-slice":
                part = self.program.instructions[end.operands[1]].shapes
                size = min(size, sum(each.size for each in part))
            written += size
        return written


def kernel_flops(instruction: Instruction) -> float | None:
    """The FLOPs that a kernel of ours says it takes; None for any other instruction."""
    if instruction.opcode != "custom-call":
        return None
    return _said(_KERNEL_FLOPS, instruction)


def _said(what: re.Pattern[str], kernel: Instruction) -> float | None:
    """What a kernel says of its cost."""
    found = what.search(kernel.rest)
    return None if found is None else float(found[1])


def _channel(collective: Instruction) -> str:
    """The key that all instructions of one collective share."""
    return collective.attribute("channel_id") or collective.name


def _hbm_bytes(shapes: Sequence[Shape]) -> int:
    """Bytes of the arrays in HBM."""
    return sum(shape.size for shape in shapes if shape.in_main_memory)


def _group(collective: Instruction, chips: int) -> int:
    """The number of chips that take part in a collective.

    Raises LookupError for an unknown form of replica groups.
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
