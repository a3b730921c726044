"""The figures of chips agree with each other, and devices are recognised."""

import pytest

from taca_jax.parallel.chips import CHIPS, chip_of


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_clock_and_matrix_units_give_the_published_flops(chip):
    assert chip.clock * chip.cores * chip.core_flop_per_cycle == pytest.approx(chip.flops, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p")]
)
def test_devices_by_their_kind(kind, name):
    assert chip_of(kind) is CHIPS[name]


def test_other_devices_have_no_figures():
    assert chip_of("cpu") is None
    assert chip_of("TPU of tomorrow") is None
