"""The training step and the denoising loop compile for a TPU, with no TPU in the machine.

In a process of its own: libtpu, once loaded, stays, and reads its settings from the environment.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HBM_BYTES = 16 * 2**30  # of one v5e chip
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu)"
)


@pytest.fixture(scope="module")
def memory():
    """Bytes by program: {"train": {"arguments": .., "temporaries": .., "outputs": ..}, ..}."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tpu.compile_small_flux"],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", ["train", "sample"])
def test_a_program_compiles_and_fits(memory, program):
    used = memory[program]
    print(program, {name: f"{size / 2**20:.1f} MiB" for name, size in used.items()})
    assert used["arguments"] > 0
    assert used["temporaries"] > 0
    assert sum(used.values()) < HBM_BYTES / 4  # the model has a few million parameters


def test_the_training_state_is_updated_in_place(memory):
    """Donated: outputs of the state's size share its memory."""
    used = memory["train"]
    assert used["aliased"] > 0.9 * used["outputs"]
