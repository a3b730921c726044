"""What the generations of TPU can do: every figure about a chip stands here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Chip:
    """One generation of TPU chip.

    Figures are of a whole chip unless they say "per core" (a core is a TensorCore). Sources: of
    memory, bandwidths and flops, cloud.google.com/tpu/docs, system architecture of each
    generation; of VMEM, docs.jax.dev/en/latest/pallas/tpu/hardware.html; the clock is what flops
    make of the size of the matrix units.

    name: as Google abbreviates it.
    memory: bytes of HBM.
    memory_bandwidth: bytes/s between HBM and the cores.
    wire_bandwidth: bytes/s to and from other chips, over all of a chip's links together.
    flops: bfloat16 FLOP/s at the most.
    clock: Hz.
    cores: cores that run one program between them.
    core_flop_per_cycle: bfloat16 FLOPs that one core's matrix units do in a cycle, per core.
    attention_share: of flops, the share at which our attention kernels run, by the static cycles of
        their compiled code (`benchmarks.attention_tpu`); v4's are taken to be v5p's.
    kernel_vmem: bytes of VMEM that one kernel may take, per core. XLA keeps the rest (of 16 MiB on
        v4, 128 on v5e and v6e, 64 on v5p) for what surrounds the kernel.
    operation_vmem: bytes of VMEM that one of XLA's own operations may take, per core, in programs
        of whole steps, chosen by `benchmarks.flux_blocks`; None is XLA's default.
    gathers: what can gather parameters from other chips while matrix units work: "products", into
        which XLA fuses the pieces of a gather, or "SparseCores", cores beside the TensorCores; None
        if nothing was seen to.
    """

    name: str
    memory: float
    memory_bandwidth: float
    wire_bandwidth: float
    flops: float
    clock: float
    cores: int
    core_flop_per_cycle: int
    attention_share: float
    kernel_vmem: int
    operation_vmem: int | None = None
    gathers: Literal["products", "SparseCores"] | None = None


_MIB, _GIB = 2**20, 2**30
_FLOP_PER_CELL = 2
"""A cell of a matrix unit multiplies and adds in a cycle."""

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            memory=32 * _GIB,
            memory_bandwidth=1228e9,
            wire_bandwidth=300e9,
            flops=275e12,
            clock=1.05e9,
            cores=2,
            core_flop_per_cycle=4 * 128 * 128 * _FLOP_PER_CELL,
            attention_share=0.97,
            kernel_vmem=15 * _MIB,
        ),
        Chip(
            name="v5e",
            memory=16 * _GIB,
            memory_bandwidth=819e9,
            wire_bandwidth=200e9,
            flops=197e12,
            clock=1.5e9,
            cores=1,
            core_flop_per_cycle=4 * 128 * 128 * _FLOP_PER_CELL,
            attention_share=0.97,
            kernel_vmem=100 * _MIB,
            operation_vmem=64 * _MIB,
            gathers="products",
        ),
        Chip(
            name="v5p",
            memory=95 * _GIB,
            memory_bandwidth=2765e9,
            wire_bandwidth=600e9,
            flops=459e12,
            clock=1.75e9,
            cores=2,
            core_flop_per_cycle=4 * 128 * 128 * _FLOP_PER_CELL,
            attention_share=0.97,
            kernel_vmem=56 * _MIB,
            operation_vmem=32 * _MIB,
            gathers="SparseCores",
        ),
        Chip(
            name="v6e",
            memory=32 * _GIB,
            memory_bandwidth=1640e9,
            wire_bandwidth=448e9,
            flops=918e12,
            clock=1.75e9,
            cores=1,
            core_flop_per_cycle=4 * 256 * 256 * _FLOP_PER_CELL,
            attention_share=0.62,
            kernel_vmem=100 * _MIB,
            operation_vmem=64 * _MIB,
            gathers="SparseCores",
        ),
    )
}

_BY_DEVICE_KIND = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device, by its `device_kind`; None for what is not in CHIPS."""
    name = _BY_DEVICE_KIND.get(device_kind)
    return None if name is None else CHIPS[name]
