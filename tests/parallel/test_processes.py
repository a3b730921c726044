"""Several processes as one: when there are others, and what they agree on."""

import json

import jax
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.parallel import processes
from taca_jax.parallel.batches import local_rows, own_rows
from taca_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from taca_jax.parallel.processes import join_processes
from tests.processes import last_line, run_cluster

NAMES = (
    *processes._GIVEN,
    *processes._COUNTS,
    *processes._HOSTS,
    "TPU_SKIP_MDS_QUERY",
)


@pytest.fixture
def joined(monkeypatch):
    """What JAX was asked to join, with no launcher about."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: asked.append(given))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_on_tpu_vm", lambda environment: False)
    return asked


def given(address="host:1234", count="4", index="3"):
    return dict(zip(processes._GIVEN, (address, count, index), strict=True))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"SLURM_STEP_NUM_TASKS": "1"}, []),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, []),
        ({"SLURM_STEP_NUM_TASKS": "2"}, [()]),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, [()]),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, [()]),
        ({"MEGASCALE_NUM_SLICES": "2"}, [()]),
        (given(), [("host:1234", 4, 3)]),
        ({"SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, [("a:1", None, None)]),
    ],
)
def test_a_cluster_is_what_a_launcher_says(joined, monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join_processes()
    assert joined == expected


def test_a_tpu_vm_is_asked_and_may_be_alone(joined, monkeypatch):
    monkeypatch.setattr(processes, "_on_tpu_vm", lambda environment: True)
    join_processes()
    assert joined == [()]

    def alone():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", alone)
    join_processes()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "set JAX_NUM_PROCESSES too"),
        ({"JAX_PROCESS_ID": "0"}, "set JAX_COORDINATOR_ADDRESS too"),
        (given(count="two"), "JAX_NUM_PROCESSES is two and JAX_PROCESS_ID 3; give numbers"),
        (given(index="4"), "JAX_PROCESS_ID is 4; of 4 processes the last is 3"),
    ],
)
def test_half_a_description_is_refused(joined, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_processes()
    assert not joined


def test_alone_nothing_is_waited_for():
    assert processes.is_first()
    assert processes.all_of(True)
    assert not processes.all_of(False)
    assert processes.names_of_all(["a", "b"]) == ["a", "b"]
    processes.wait_for_all("nothing")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert tuple(mesh.shape) == AXES
    np.testing.assert_array_equal(local_rows(mesh, 6), np.arange(6))
    np.testing.assert_array_equal(own_rows(mesh, 6), np.arange(6))


TOGETHER = """
import json
import jax, numpy as np
from taca_jax.parallel import processes
from taca_jax.parallel.batches import batch_sharding, local_rows, own_rows
from taca_jax.parallel.mesh import MeshConfig, make_mesh
processes.join_processes()
processes.wait_for_all("a start")
index = jax.process_index()
found = {"count": jax.process_count(), "devices": jax.device_count(), "first": processes.is_first()}
found["all"] = [processes.all_of(True), processes.all_of(index == 0)]
found["names"] = processes.names_of_all(["one", "zwei"] if index else ["drei und mehr"])
for name, config in {"data": MeshConfig(data=4, fsdp=1), "tensor": MeshConfig(tensor=4)}.items():
    mesh = make_mesh(config)
    rows = local_rows(mesh, 8)
    array = jax.make_array_from_process_local_data(batch_sharding(mesh), 10.0 * rows)
    found[name] = {"rows": rows.tolist(), "array": processes.on_host(array).tolist()}
    found[name]["own"] = own_rows(mesh, 8).tolist()
print(json.dumps(found))
"""


def test_two_processes_agree():
    done = run_cluster("-c", TOGETHER, processes=2, devices=2)
    found = [json.loads(last_line(each)) for each in done]
    for index, each in enumerate(found):
        assert (each["count"], each["devices"], each["first"]) == (2, 4, index == 0)
        assert each["all"] == [True, False]
        assert each["names"] == ["drei und mehr", "one", "zwei"]
        assert each["data"]["rows"] == [[0, 1, 2, 3], [4, 5, 6, 7]][index]
        assert each["data"]["own"] == each["data"]["rows"]
        assert each["tensor"]["rows"] == list(range(8))  # heads are shared, samples are not
        assert each["tensor"]["own"] == ([] if index else list(range(8)))
        assert each["data"]["array"] == each["tensor"]["array"] == [10.0 * i for i in range(8)]
