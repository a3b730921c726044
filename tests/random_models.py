"""Models whose every parameter is random, made without compiling anything.

Initialisers compile a program per parameter's shape, which takes longer than most tests; and what
starts at zero (modulations, output heads) would hide what it does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from taca_jax.nn.kinds import abstract_model, filled, flat_params


def random_model(
    config: Any,
    *,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Any:
    """The model of a config: kernels and embeddings that keep the scale of what they are given,
    norms' scales around 1, and biases around 0."""
    model = abstract_model(config, dtype=dtype)
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, param in flat_params(model).items():
        noise = rng.standard_normal(param.shape, np.float32)
        arrays[name] = jnp.asarray(_scaled(name, noise), param_dtype)
    return filled(model, arrays)


def randomise(model: nnx.Module, kind: type[nnx.Param], *, seed: int = 0, scale: float) -> None:
    """Draws all parameters of a kind anew, with this deviation."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, kind)

    def drawn(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    nnx.update(model, jax.tree.map(drawn, state))


def _scaled(name: str, noise: np.ndarray) -> np.ndarray:
    match name.rpartition(".")[2]:
        case "kernel" if noise.ndim == 4:  # a convolution's: height, width, in, out
            return noise / np.prod(noise.shape[:3]) ** 0.5
        case "kernel":  # [in, out], or of a stack [layers, in, out]
            return noise / noise.shape[-2] ** 0.5
        case "scale":
            return 1 + 0.1 * noise
        case "bias":
            return 0.1 * noise
        case "variance":
            return 0.5 + noise**2
        case _:
            return noise
