"""What XLA's fusion has to be told on TPUs: which arrays are cheaper written once, and how much of
a chip's vector memory an operation may take.

The TPU compiler computes elementwise operations inside the product that reads them, again for every
tile of the output; a norm or GELU's derivative then takes longer than the product. It may even put
one of an MLP's products inside the other. Products themselves are faster the larger their tiles
are. Elsewhere they are calls into a library, and nothing is to be told.
"""

import jax

from taca_jax.attention.pallas_tpu.target import device_kind, this_chip


def step_options() -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for a whole step of training or sampling on the current
    devices: the larger tiles are worth more than arrays kept in vector memory between operations.
    Empty where there is nothing to be told."""
    chip = this_chip()
    if chip is None or chip.operation_vmem is None:
        return {}
    return {"xla_tpu_scoped_vmem_limit_kib": str(chip.operation_vmem // 1024)}


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


def _barrier(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x) if device_kind().startswith("TPU") else x
