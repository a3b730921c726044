"""Joint attention over a mesh equals joint attention on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    """In a process of its own: the number of devices is decided before JAX starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.sharded_runs"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["data", "data and fsdp", "tensor", "context", "mixed"])
def test_parts_are_the_whole(found, mesh):
    assert max(found[mesh]) < 1e-6


def test_heads_that_do_not_divide(found):
    assert "4 heads do not divide over the mesh's 8 devices of axis 'tensor'" in found["refused"]
