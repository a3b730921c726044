"""Models over several devices and processes: what each reads, and that what is written is whole."""

import json
import math
from dataclasses import replace

import pytest

from taca_jax.families.flux.model import FLUX_KIND
from taca_jax.nn.kinds import shapes_of
from taca_jax.parallel.rules import parameter_spec
from taca_jax.weights.folders import save_model
from tests.meshes import abstract_mesh
from tests.models import FLUX
from tests.processes import run_cluster, run_python
from tests.random_models import random_model

CONFIG = replace(FLUX, num_heads=8, txt_dim=24)
"""All sides of whose kernels divide by eight, or nearly all."""
SCRIPT = ("-m", "tests.weights.sharded_models")
DEVICES = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Written from one device."""
    folder = tmp_path_factory.mktemp("one") / "model"
    save_model(folder, random_model(CONFIG))
    return folder


def layers_of(shape):
    """What goes at a time: of a stack of kernels a layer, of anything else all."""
    return [shape[1:]] * shape[0] if len(shape) > 2 else [shape]


def check_written(folder, source) -> None:
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def findings(done, folder):
    """What each process says that moved; not on stdout, to which gloo writes too."""
    for index, each in enumerate(done):
        assert each.returncode == 0, each.stderr[-3000:]
        yield json.loads((folder / f"process-{index}.json").read_text())


def check_brought(found) -> None:
    """A layer at a time, in the order of the file: never a whole stack."""
    shapes = shapes_of(CONFIG)
    expected = [list(each) for path in sorted(shapes) for each in layers_of(shapes[path])]
    assert found["brought"] == expected
    assert found["kept"] == []


def test_one_process_with_eight_devices(source, tmp_path):
    done = run_python(*SCRIPT, str(source), str(tmp_path), devices=DEVICES)
    (found,) = findings([done], tmp_path)
    check_written(tmp_path / "process-0" / "model", source)
    check_brought(found)
    shapes = shapes_of(CONFIG)
    for path, shape in shapes.items():  # everything once, however many devices have parts of it
        expected = [[1, *each] for each in layers_of(shape)] if len(shape) > 2 else [list(shape)]
        assert found["read"][path] == expected
    assert found["held"] < 4 * sum(map(math.prod, shapes.values())) / DEVICES * 1.5


def test_two_processes_with_four_devices_each(source, tmp_path):
    """Of kernels whose rows are shared each reads its half; where columns are, all rows."""
    done = run_cluster(*SCRIPT, str(source), str(tmp_path), processes=2, devices=DEVICES // 2)
    mesh = abstract_mesh(fsdp=DEVICES)
    halves = 0
    for found in findings(done, tmp_path):
        check_brought(found)
        for path, shape in shapes_of(CONFIG).items():
            spec = parameter_spec(FLUX_KIND.sharding, path, shape, mesh)
            rows = 1 if len(shape) > 2 else 0
            shared = rows < len(spec) and spec[rows] is not None
            read = sum(map(math.prod, found["read"][path]))
            assert read == math.prod(shape) // (2 if shared else 1), path
            assert len(found["read"][path]) == len(layers_of(shape))
            halves += shared
    assert halves > 20
    check_written(tmp_path / "process-0" / "model", source)
    assert not (tmp_path / "process-1").exists()  # the first writes alone
