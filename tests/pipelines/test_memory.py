"""What loading a pipeline takes of memory beyond the model that it loads."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.load_memory import measure
from taca_jax.families.flux.model import FLUX_DEV
from taca_jax.weights.loading import AT_ONCE

CONFIG = dataclasses.replace(FLUX_DEV, num_heads=12, num_double_blocks=2, num_single_blocks=8)
"""FLUX of half the width: 0.9 GB, its largest tensor 28 MB, its largest stack 189 MB."""


@pytest.mark.slow
def test_loading_takes_little_more_than_the_model(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the resident memory from /proc")
    result = measure(tmp_path, CONFIG)
    print(result)
    assert result.largest_stack > AT_ONCE  # or no stack would be filled layer by layer
    for took in (result.original, result.converted):
        # A small stack, or a layer of a large one as it is read, as it is turned and on its way,
        # beside what the first programs take to compile.
        assert took.excess < AT_ONCE + 3 * result.largest_tensor < result.size / 4
