"""Training over a mesh of devices equals training on one, and runs from the command line."""

import json

import pytest

from tests.processes import last_line, run_python
from tests.test_train_cli import command

MESHES = ("data", "fsdp", "tensor", "context", "mixed")
LARGEST_SHARE = {"data": 1.0, "fsdp": 0.15, "tensor": 0.54, "context": 0.52, "mixed": 0.28}
"""Of the base's bytes, what one device holds: norms, biases and what does not divide are whole."""


def check(tmp_path, *meshes, quantization="none", optimizer="adamw"):
    module = "tests.training.sharded_steps"
    script = ("-m", module, str(tmp_path / "base"), quantization, optimizer, *meshes)
    found = json.loads(last_line(run_python(*script, devices=8)))
    assert set(found) == set(meshes)
    for name, errors in found.items():
        assert errors["numbers"] < 1e-5, name
        assert errors["parameters"] < 1e-5, name
        assert errors["share"] <= LARGEST_SHARE[name], name


def test_a_mixed_mesh_trains_as_one_device_does(tmp_path):
    check(tmp_path, "mixed")


def test_adafactor_trains_on_a_mesh_as_on_one_device(tmp_path):
    check(tmp_path, "mixed", optimizer="adafactor")


@pytest.mark.slow
def test_every_mesh_trains_as_one_device_does(tmp_path):
    check(tmp_path, *MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_trains_as_on_one_device(tmp_path, quantization):
    """Loaded straight onto the mesh, codes and scales shared."""
    check(tmp_path, *MESHES, quantization=quantization)


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
    run = run_python(
        "train.py", *command(out_dir=str(tmp_path / "mesh"), **wanted), *mesh, devices=8
    )
    assert run.returncode == 0, run.stderr[-3000:]
    alone = run_python("train.py", *command(out_dir=str(tmp_path / "one"), **wanted))
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert losses(tmp_path / "mesh") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (tmp_path / "mesh" / "model" / "pipeline.json").is_file()
    for newer in (tmp_path / "mesh" / "checkpoints").glob("4"):
        newer.rename(tmp_path / "taken away")
    again = run_python(
        "train.py",
        *command(out_dir=str(tmp_path / "mesh"), **wanted, resume="true"),
        *mesh,
        devices=8,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(tmp_path / "mesh") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    odd = command(out_dir=str(tmp_path / "odd"), **(wanted | {"data__batch_size": "6"}))
    refused = run_python("train.py", *odd, devices=8)
    assert refused.returncode == 1
    assert "data.batch_size is 6, which 8 groups of devices" in refused.stderr
