"""What XLA has to be told on TPUs: which arrays are cheaper written once, how they lie in memory,
how much of a chip's vector memory an operation may take, and who moves arrays between chips.

The TPU compiler computes elementwise operations inside the product that reads them, again for every
tile of the output; a norm or GELU's derivative then takes longer than the product. It may even put
one of an MLP's products inside the other. Products themselves are faster the larger their tiles
are. Elsewhere they are calls into a library, and nothing is to be told.
"""

import os

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from taca_jax.attention.pallas_tpu.target import device_kind, this_chip
from taca_jax.parallel.chips import Chip

_JAX_READS_SPARSE_CALLS = (0, 12)
"""The first version of JAX that was seen to read compiled programs in which SparseCores are called,
as plans do; 0.10.2 cannot."""


def step_options() -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for a whole step of training or sampling on the current
    devices: larger tiles, which are worth more than arrays kept in vector memory between
    operations, and SparseCores, where there are some, that gather parameters while the TensorCores
    work. Empty where there is nothing to be told; without those that LIBTPU_INIT_ARGS names."""
    chip = this_chip()
    if chip is None:
        return {}
    options = {}
    if chip.operation_vmem is not None:
        options["xla_tpu_scoped_vmem_limit_kib"] = str(chip.operation_vmem // 1024)
    if chip.gathers == "SparseCores" and gathers_meanwhile(chip):
        for gather in ("all_gather", "2d_all_gather"):
            options[f"xla_tpu_enable_sparse_core_collective_offload_{gather}"] = "true"
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    return {name: value for name, value in options.items() if name not in given}


def gathers_meanwhile(chip: Chip | None) -> bool:
    """Whether `step_options` let parameters be gathered while a chip works."""
    if chip is None or chip.gathers is None:
        return False
    return chip.gathers == "products" or jax.__version_info__ >= _JAX_READS_SPARSE_CALLS


@jax.custom_vjp
def written_once(x: jax.Array) -> jax.Array:
    """x, to be read from memory by what follows, not computed again; its gradient is left free."""
    return _barrier(x)


@jax.custom_vjp
def gradient_written_once(x: jax.Array) -> jax.Array:
    """x, whose gradient is written once as `written_once` does; x itself is left free."""
    return x


written_once.defvjp(lambda x: (_barrier(x), None), lambda _, gradient: (gradient,))
gradient_written_once.defvjp(lambda x: (x, None), lambda _, gradient: (_barrier(gradient),))


def channels_together(x: jax.Array) -> jax.Array:
    """x, whose last axis lies together in memory. Without it XLA may carry tokens through a loop
    with the token axis last, and copy them for what reads their channels."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if _on_tpu() else x


def _barrier(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x) if _on_tpu() else x


def _on_tpu() -> bool:
    return device_kind().startswith("TPU")
