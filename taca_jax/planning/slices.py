"""The slices of TPUs that can be rented, by name, with the figures of their chips."""

from collections.abc import Iterator
from dataclasses import dataclass

from taca_jax.errors import UserError
from taca_jax.parallel.chips import CHIPS, Chip

_SIDES = {
    "v5e": {
        1: "1x1",
        4: "2x2",
        8: "2x4",
        16: "4x4",
        32: "4x8",
        64: "8x8",
        128: "8x16",
        256: "16x16",
    },
    "v5p": {
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
        512: "8x8x8",
    },
}
_SIDES["v6e"] = _SIDES["v5e"]


@dataclass(frozen=True)
class Slice:
    """Chips that are rented together: `v5e-16` has 16 chips; `v5p-8` has 8 cores, two per chip."""

    name: str
    chip: Chip
    chips: int
    topology: str

    @classmethod
    def of(cls, name: str) -> "Slice":
        """The slice of this name. Raises UserError for an unknown name, with a list of all."""
        kind, _, number = name.partition("-")
        chips = int(number) if number.isdigit() else 0
        if kind == "v5p":
            chips, odd = divmod(chips, 2)
            chips = 0 if odd else chips
        if kind not in CHIPS or chips not in _SIDES[kind]:
            raise UserError(f"plan={name}: no such slice; there are {', '.join(slice_names())}")
        return cls(name, CHIPS[kind], chips, f"{kind}:{_SIDES[kind][chips]}")

    def larger(self) -> Iterator["Slice"]:
        """Slices of the same generation with more chips, the smallest first."""
        kind = self.name.partition("-")[0]
        for name in slice_names(kind):
            other = Slice.of(name)
            if other.chips > self.chips:
                yield other


def slice_names(kind: str | None = None) -> list[str]:
    """The names of all slices, or of those of one generation."""
    kinds = CHIPS if kind is None else [kind]
    return [f"{k}-{n * (2 if k == 'v5p' else 1)}" for k in kinds for n in _SIDES[k]]
