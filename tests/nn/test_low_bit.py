"""Kernels in 8 and 4 bits: what codes stand for, products with them, and what those keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from taca_jax.nn.low_bit import NF4_LEVELS, decode, low_bit_matmul
from tests.compare import relative_error

INPUTS, OUTPUTS, BLOCK = 32, 24, 16


def test_the_levels_are_the_normal_distributions_quantiles():
    """Dettmers et al. 2023, appendix E: eight above zero, seven below, scaled to 1."""
    end = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    positive = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    levels = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), atol=1e-6)


def codes_and_scales(to):
    rng = np.random.default_rng(0)
    if to == "int8":
        codes = rng.integers(-127, 128, (INPUTS, OUTPUTS))
        return jnp.asarray(codes, jnp.int8), jnp.asarray(rng.random((1, OUTPUTS)), jnp.float32)
    codes = rng.integers(0, 16, (INPUTS, OUTPUTS))
    scales = rng.random((INPUTS // BLOCK, OUTPUTS))
    return jnp.asarray(codes, jnp.uint4), jnp.asarray(scales, jnp.bfloat16)


def kernel_of(codes, scales):
    """By the definition, in numpy."""
    numbers, wide = np.asarray(codes).astype(np.int32), np.asarray(scales).astype(np.float32)
    levels = np.array(NF4_LEVELS, np.float32)
    values = numbers.astype(np.float32) if codes.dtype == jnp.int8 else levels[numbers]
    return values * np.repeat(wide, INPUTS // len(wide), axis=0)


@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_codes_stand_for_levels_times_scales(to):
    codes, scales = codes_and_scales(to)
    decoded = jax.jit(decode, static_argnames="dtype")(codes, scales, dtype=jnp.float32)
    np.testing.assert_array_equal(decoded, kernel_of(codes, scales))


@pytest.mark.parametrize("to", ["int8", "nf4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 8e-3)])
def test_products_and_gradients_are_the_decoded_kernels(to, dtype, tolerance):
    codes, scales = codes_and_scales(to)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((3, 5, INPUTS)), dtype)
    dy = jnp.asarray(rng.standard_normal((3, 5, OUTPUTS)), dtype)

    @jax.jit
    def both(x, dy):
        y, pull = jax.vjp(lambda x: low_bit_matmul(x, codes, scales), x)
        return y, pull(dy)[0]

    y, dx = both(x, dy)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    kernel = kernel_of(codes, scales)
    assert relative_error(y, np.float64(x) @ kernel) < tolerance
    assert relative_error(dx, np.float64(dy) @ kernel.T) < tolerance


@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_the_backward_pass_keeps_codes_and_has_no_gradient_of_them(to):
    codes, scales = codes_and_scales(to)

    def pulled(x, codes, scales):
        _, pull = jax.vjp(low_bit_matmul, x, codes, scales)
        return pull, pull(jnp.ones((3, OUTPUTS), x.dtype))

    x = jax.ShapeDtypeStruct((3, INPUTS), jnp.bfloat16)
    kept, (dx, d_codes, d_scales) = jax.eval_shape(pulled, x, codes, scales)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {codes.dtype, scales.dtype}
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert d_codes.dtype == jax.dtypes.float0
    assert d_scales.shape == scales.shape
