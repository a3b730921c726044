"""The generations of TPU, by what JAX calls their devices."""

from dataclasses import dataclass

_GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def generation(device_kind: str) -> str | None:
    """`v5e`, `v5p` or `v6e`; None for any other device."""
    return _GENERATIONS.get(device_kind)


@dataclass(frozen=True)
class Chip:
    """One TPU chip: bytes of memory, bf16 FLOP/s, bytes/s to its memory and to other chips, Hz.

    Source: cloud.google.com/tpu/docs, system architecture of each generation; of the clock, what
    flops make of the size of the matrix units.
    """

    memory: float
    flops: float
    memory_bandwidth: float
    wire_bandwidth: float
    clock: float


CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9, 1.5e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9, 448e9, 1.75e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9, 1.75e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device, by its `device_kind`; None for what is not in CHIPS."""
    name = generation(device_kind)
    return None if name is None else CHIPS[name]
