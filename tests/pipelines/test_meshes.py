"""Pictures over several devices, and several processes, are those of one device."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.drawn_on_meshes import CASES
from tests.processes import last_line, run_cluster, run_python

SETTINGS = "taca=none lora=none dtype=float32 steps=2 num_images=3"
GENERATE = ["generate.py", "--config", "shapes_taca", *SETTINGS.split()]


def check(tmp_path, *names):
    script = ("-m", "tests.pipelines.drawn_on_meshes", str(tmp_path / "p"), *names)
    found = json.loads(last_line(run_python(*script, devices=8)))
    for name in names:
        assert found[name]["difference"] < 1e-5, name
    return {name: found[name]["mesh"] for name in names}


def test_a_mixed_mesh_draws_as_one_device_does(tmp_path):
    """Three pictures are filled up to four, and one open mesh is chosen for one picture: its two
    halves of guidance are samples, and the rest share heads."""
    meshes = check(tmp_path, "mixed", "open, one")
    assert meshes["open, one"] == {"fsdp": 2, "tensor": 4}


@pytest.mark.slow
def test_every_mesh_draws_as_one_device_does(tmp_path):
    meshes = check(tmp_path, *CASES)
    assert meshes["open, four"] == {"fsdp": 8}


def drawn(folder):
    return [np.asarray(Image.open(path), int) for path in sorted(folder.glob("*.png"))]


def test_two_processes_draw_the_pictures_of_one(tmp_path):
    command = [*GENERATE, "prompt=a red circle and a blue square", "guidance=3"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = run_python(*command, f"out={tmp_path / 'one' / 'x.png'}")
    assert alone.returncode == 0, alone.stderr[-3000:]
    cluster = run_cluster(
        *command,
        *("batch_size=2", "progress=true", f"out={tmp_path / 'two' / 'x.png'}"),
        processes=2,
        devices=4,
    )
    for done in cluster:
        assert done.returncode == 0, done.stderr[-3000:]
    assert "devices: 8 x CPU, mesh of" in cluster[0].stdout
    assert "3 pictures in batches of 2" in cluster[0].stdout
    assert cluster[0].stdout.count("wrote ") == 3
    assert "wrote " not in cluster[1].stdout
    one, two = drawn(tmp_path / "one"), drawn(tmp_path / "two")
    assert len(one) == len(two) == 3
    for alone, together in zip(one, two, strict=True):
        assert abs(alone - together).max() <= 1


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("mesh.tensor=3", "3 does not divide the 8 devices; change one, or leave all out"),
        ("mesh.fsdp=1 mesh.tensor=8", "mesh.tensor is 8; the transformer's 4 heads do not divide"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(tmp_path, mesh, message):
    command = [*GENERATE, "prompt=a red circle", f"out={tmp_path / 'x.png'}", *mesh.split()]
    done = run_python(*command, devices=8)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
