"""Training over a mesh of devices equals training on one, and runs from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_train_cli import command

ROOT = Path(__file__).resolve().parents[2]
MESHES = ("data", "fsdp", "tensor", "context", "mixed")
LARGEST_SHARE = {"data": 1.0, "fsdp": 0.15, "tensor": 0.54, "context": 0.52, "mixed": 0.28}
"""Of the base's bytes, what one device holds: norms, biases and what does not divide are whole."""


def on_eight_devices(*arguments):
    """Runs Python in a process of its own: the number of devices is decided before JAX starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def check(tmp_path, *meshes):
    done = on_eight_devices("-m", "tests.training.sharded_steps", str(tmp_path / "base"), *meshes)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(meshes)
    for name, errors in found.items():
        assert errors["numbers"] < 1e-5, name
        assert errors["parameters"] < 1e-5, name
        assert errors["share"] <= LARGEST_SHARE[name], name


def test_a_mixed_mesh_trains_as_one_device_does(tmp_path):
    check(tmp_path, "mixed")


@pytest.mark.slow
def test_every_mesh_trains_as_one_device_does(tmp_path):
    check(tmp_path, *MESHES)


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_a_run_on_a_mesh_from_the_command_line(tmp_path):
    """Loading, checkpoints, resuming, samples, the measurement and export are all sharded there."""
    wanted = {
        "steps": "4",
        "save_every": "2",
        "data__batch_size": "8",
        "sample_every": "4",
        "evaluate": "none",
    }
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    run = on_eight_devices("train.py", *command(out_dir=str(tmp_path / "mesh"), **wanted), *mesh)
    assert run.returncode == 0, run.stderr[-3000:]
    alone = subprocess.run(
        [sys.executable, "train.py", *command(out_dir=str(tmp_path / "one"), **wanted)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert losses(tmp_path / "mesh") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (tmp_path / "mesh" / "model" / "pipeline.json").is_file()
    for newer in (tmp_path / "mesh" / "checkpoints").glob("4"):
        newer.rename(tmp_path / "taken away")
    again = on_eight_devices(
        "train.py",
        *command(out_dir=str(tmp_path / "mesh"), **wanted, resume="true"),
        *mesh,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(tmp_path / "mesh") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    refused = on_eight_devices(
        "train.py", *command(out_dir=str(tmp_path / "odd"), **(wanted | {"data__batch_size": "6"}))
    )
    assert refused.returncode == 1
    assert "data.batch_size is 6, which 8 groups of devices" in refused.stderr
