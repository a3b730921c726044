"""Slices of TPUs that can be rented, by name: how many chips, and how they are wired."""

from collections.abc import Iterator
from dataclasses import dataclass

from taca_jax.errors import UserError
from taca_jax.parallel.chips import CHIPS, Chip

_TORUS_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_TORUS_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
_SHAPES = {"v5e": _TORUS_2D, "v6e": _TORUS_2D, "v5p": _TORUS_3D}
"""For each generation that can be planned for: the shape of a slice by its number of chips."""

_COUNTED_PER_CHIP = {"v5e": 1, "v6e": 1, "v5p": CHIPS["v5p"].cores}
"""The number in a slice's name counts chips, except for v5p, where it counts cores."""


@dataclass(frozen=True)
class Slice:
    """Chips that are rented together: `v5e-16` is 16 chips, `v5p-8` is 4 chips of 2 cores.

    topology: what JAX calls such a slice, like `v5e:4x4`.
    """

    name: str
    chip: Chip
    chips: int
    topology: str

    @classmethod
    def of(cls, name: str) -> "Slice":
        """The slice of that name. Raises UserError for an unknown one, listing all there are."""
        kind, _, number = name.partition("-")
        if name not in slice_names():
            raise UserError(f"plan={name}: no such slice; there are {', '.join(slice_names())}")
        chips = int(number) // _COUNTED_PER_CHIP[kind]
        return cls(name, CHIPS[kind], chips, f"{kind}:{_SHAPES[kind][chips]}")

    def larger(self) -> Iterator["Slice"]:
        """Those of the same generation with more chips, the smallest first."""
        for name in slice_names(self.chip.name):
            other = Slice.of(name)
            if other.chips > self.chips:
                yield other


def slice_names(kind: str | None = None) -> list[str]:
    """Every slice that can be planned for, or those of one generation of chips."""
    kinds = _SHAPES if kind is None else [kind]
    return [f"{kind}-{n * _COUNTED_PER_CHIP[kind]}" for kind in kinds for n in _SHAPES[kind]]
