"""Key tables: what becomes of an array, and that a table covers its model exactly."""

import numpy as np
import pytest

from taca_jax.formats.key_table import (
    CONVOLUTION,
    KEEP,
    SWAP_HALVES,
    TRANSPOSE,
    TRANSPOSE_SWAPPED,
    Rule,
    Table,
)


@pytest.mark.parametrize("transform", [KEEP, TRANSPOSE, SWAP_HALVES, TRANSPOSE_SWAPPED])
def test_transforms_are_undone_and_know_their_shapes(transform):
    x = np.arange(24).reshape(6, 4)
    np.testing.assert_array_equal(transform.store(transform.load(x)), x)
    assert transform.stored_shape(transform.load(x).shape) == x.shape
    assert transform.stored_shape(x.shape) == transform.store(x).shape
    y = np.arange(120).reshape(2, 3, 4, 5)
    assert CONVOLUTION.load(y).shape == (4, 5, 3, 2)
    np.testing.assert_array_equal(CONVOLUTION.store(CONVOLUTION.load(y)), y)


def test_diffusers_final_modulation_is_scale_then_shift():
    stored = np.array([1.0, 2.0, 3.0, 4.0])  # scale 1 2, shift 3 4
    np.testing.assert_array_equal(SWAP_HALVES.load(stored), [3, 4, 1, 2])


def test_a_table_that_does_not_cover_the_model_is_a_defect():
    one = Table("a layout", (Rule("x", "a"),))
    with pytest.raises(LookupError, match="0 rules of a layout are about b"):
        list(one.pieces({"a": (2,), "b": (2,)}))
    two = Table("a layout", (Rule("x", "a"), Rule("y", "a")))
    with pytest.raises(LookupError, match="2 rules"):
        list(two.pieces({"a": (2,)}))
