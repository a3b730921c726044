"""The operations of a compiled program, one by one: what each takes, and what it could take at the
least."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from taca_jax.parallel.chips import Chip
from taca_jax.planning.hlo import Instruction, Program
from taca_jax.planning.traffic import Reader, kernel_flops

_SOURCE = re.compile(r'op_name="([^"]*)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{size=([\dx]+)")


@dataclass(frozen=True)
class Operation:
    """One instruction of the schedule; figures are of one run of it on one chip.

    source: the JAX operation that it comes from, or the last of those that were fused. times: how
    often a step runs it. seconds: by the compiler's estimate. moved: bytes read from and written to
    main memory. flops: of its matrix products.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    times: int
    seconds: float
    moved: float
    flops: float

    def limit(self, chip: Chip) -> float:
        """The least seconds: at the peak of the matrix units or of the memory."""
        return max(self.flops / chip.flops, self.moved / chip.memory_bandwidth)


def operations(text: str, chip: Chip) -> list[Operation]:
    """All operations of a program that take time, those first on which most of a step is spent.

    Raises as `traffic.read_traffic`.
    """
    program = Program.parse(text)
    reader = Reader(program, chip)
    found = [
        Operation(
            name=each.name,
            source=source[1] if (source := _SOURCE.search(each.rest)) else "",
            shape=each.shapes[0].dimensions if each.shapes else (),
            times=times,
            seconds=reader.seconds(each),
            moved=reader.memory(each),
            flops=_flops(program, each),
        )
        for each, times in _scheduled(program, program.entry, 1)
    ]
    timed = [each for each in found if each.seconds]
    return sorted(timed, key=lambda each: -each.times * each.seconds)


def _scheduled(program: Program, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
    """The instructions of a computation and those that it calls, with how often each runs."""
    for each in program.computations[name]:
        if each.opcode == "while":
            yield from _scheduled(program, each.attribute("body"), times * program.trips(each))
        elif each.opcode in ("call", "conditional"):
            for called in each.called:
                yield from _scheduled(program, called, times)
        else:
            yield each, times


def _flops(program: Program, instruction: Instruction) -> float:
    """FLOPs of the matrix products in an instruction."""
    if instruction.opcode == "fusion":
        inside = program.computations[instruction.called[0]]
        return sum(_flops(program, each) for each in inside)
    if instruction.opcode == "custom-call":
        return kernel_flops(instruction) or 0.0
    labels = _LABELS.search(instruction.rest)
    if instruction.opcode != "convolution" or labels is None:
        return 0.0
    left, right = (program.instructions[name].shapes[0] for name in instruction.operands)
    sizes = [
        dict(zip(of, shape.dimensions, strict=True))
        for of, shape in zip(labels.groups(), (left, right, instruction.shapes[0]), strict=True)
    ]
    taken, kernel, made = sizes
    window = _WINDOW.search(instruction.rest)
    spatial = [] if window is None else [*map(int, window[1].split("x"))]
    # Of a window that reaches beyond its input only what lies on it is multiplied.
    taps = math.prod(
        size * min(taken[str(axis)], made[str(axis)]) for axis, size in enumerate(spatial)
    )
    return 2.0 * taken["b"] * taken["f"] * kernel["o"] * taps
