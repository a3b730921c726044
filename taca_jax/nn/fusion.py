"""Where XLA's fusion has to be told on TPUs what is cheaper: an array that is written once.

The TPU compiler computes elementwise operations inside the product that reads them, again for every
tile of the output; a norm or GELU's derivative then takes longer than the product. It may even put
one of an MLP's products inside the other. Elsewhere products are calls into a library, and nothing
is to be told.
"""

import jax

from taca_jax.attention.pallas_tpu.target import device_kind


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
