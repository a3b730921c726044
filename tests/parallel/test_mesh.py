"""Meshes that the devices which are there cannot make."""

import jax
import pytest

from taca_jax.errors import UserError
from taca_jax.parallel.mesh import AXES, MeshConfig, make_mesh


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
