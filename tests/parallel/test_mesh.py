"""Meshes: what devices there are for each axis, and which of them share something."""

import jax
import pytest

from taca_jax.errors import UserError
from taca_jax.parallel.mesh import AXES, MeshConfig, dividing_axes, make_mesh
from tests.meshes import abstract_mesh


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=8), r"mesh\.fsdp=8, .*: that is 8 devices, and there is 1; change one"),
        (MeshConfig(data=2, fsdp=1), r"that is 2 devices, and there is 1"),
        (MeshConfig(context=4, fsdp=1), r"that is 4 devices, and there is 1"),
        (MeshConfig(tensor=2), r"mesh\.tensor=2: 2 does not divide the 1 device;"),
        (MeshConfig(data=-1, tensor=2), r"2 does not divide the 1 device;"),
    ],
)
def test_one_device_is_not_taken_for_several(config, message):
    with pytest.raises(UserError, match=message):
        config.sizes(1)
    with pytest.raises(UserError, match=message):
        make_mesh(config, jax.devices()[:1])


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=-1), MeshConfig(fsdp=1)])
def test_one_device_is_a_mesh_of_ones(config):
    assert config.sizes(1) == dict.fromkeys(AXES, 1)
    assert make_mesh(config, jax.devices()[:1]).size == 1


def test_axes_are_taken_while_they_divide():
    mesh = abstract_mesh(data=2, fsdp=4)
    assert dividing_axes(mesh, ("data", "fsdp"), 16) == ("data", "fsdp")
    assert dividing_axes(mesh, ("data", "fsdp"), 6) == ("data",)
    assert dividing_axes(mesh, ("data", "fsdp"), 3) is None
    assert dividing_axes(mesh, ("context",), 4) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(), {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}),
        (MeshConfig(data=-1), {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}),
        (MeshConfig(data=-1, fsdp=2), {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}),
        (
            MeshConfig(fsdp=2, tensor=2, context=2),
            {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
        ),
    ],
)
def test_the_rest_of_the_devices_goes_to_one_axis(config, expected):
    assert config.sizes(8) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(data=-1, fsdp=-1), "only one axis of mesh may be -1"),
        (lambda: MeshConfig(tensor=0), "mesh.tensor is 0; it must be 1 or more, or -1"),
        (lambda: MeshConfig(tensor=3).sizes(8), "3 does not divide the 8 devices"),
        (lambda: MeshConfig(fsdp=4).sizes(8), "that is 4 devices, and there are 8"),
    ],
)
def test_meshes_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
