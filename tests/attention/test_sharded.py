"""Joint attention over a mesh equals joint attention on one device."""

import json

import pytest

from tests.processes import last_line, run_python


@pytest.fixture(scope="module")
def found():
    """In a process of its own: the number of devices is decided before JAX starts."""
    return json.loads(last_line(run_python("-m", "tests.attention.sharded_runs", devices=8)))


@pytest.mark.parametrize(
    "mesh", ["data", "data and fsdp", "tensor", "context", "mixed", "chunks", "sums"]
)
def test_parts_are_the_whole(found, mesh):
    assert max(found[mesh]) < 1e-6


def test_heads_that_do_not_divide(found):
    assert "4 heads do not divide over the mesh's 8 devices of axis 'tensor'" in found["refused"]
