"""Which chip the kernels are compiled for."""

import jax

from taca_jax.parallel.chips import Chip, chip_of

UNKNOWN_KERNEL_VMEM = 12 * 2**20
"""Bytes of VMEM that a kernel may take on a TPU that is not in the table of chips: every generation
so far has 16 MiB at least."""


def device_kind() -> str:
    """The kind of the devices of the mesh that is set, which may be elsewhere, or of this one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def this_chip() -> Chip | None:
    """The chip that is compiled for; None for a TPU that is not known, and for anything else."""
    return chip_of(device_kind())


def kernel_vmem(chip: Chip | None) -> int:
    """Bytes of VMEM that one kernel may take on a chip, or (None) on one that is not known."""
    return UNKNOWN_KERNEL_VMEM if chip is None else chip.kernel_vmem
