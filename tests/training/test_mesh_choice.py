"""Where parameters are whole on each device, and where they are shared."""

from dataclasses import replace

import jax
import pytest
from taca_jax.training.mesh_choice import parameter_bytes, settled

from configs import flux_taca, sd35_taca
from taca_jax.nn.lora import LoRAConfig
from taca_jax.parallel.chips import CHIPS
from taca_jax.parallel.mesh import MeshConfig

WHOLE, SHARED = MeshConfig(data=-1, fsdp=1), MeshConfig()
DEVICE = jax.devices()[0]


def cached(config):
    return replace(config, data=replace(config.data, encode="cache"))


@pytest.mark.parametrize(
    ("config", "chip", "mesh"),
    [
        (flux_taca.CONFIG, "v5p", WHOLE),
        (cached(flux_taca.CONFIG), "v6e", SHARED),
        (replace(flux_taca.CONFIG, lora=None), "v5p", SHARED),
        (cached(sd35_taca.CONFIG), "v6e", WHOLE),
        (cached(sd35_taca.CONFIG), "v5e", SHARED),  # its text encoders encode first
        (sd35_taca.CONFIG, "v6e", SHARED),
    ],
)
def test_parameters_are_whole_where_they_have_room(config, chip, mesh):
    assert settled(config, CHIPS[chip], DEVICE) == mesh


def test_tensor_parallel_devices_have_room_together():
    config = replace(cached(flux_taca.CONFIG), mesh=MeshConfig(tensor=4))
    assert settled(config, CHIPS["v6e"], DEVICE) == MeshConfig(data=-1, fsdp=1, tensor=4)


def test_what_is_asked_for_is_left_alone():
    for mesh in (MeshConfig(fsdp=-1), MeshConfig(data=2), MeshConfig(tensor=-1)):
        assert settled(replace(flux_taca.CONFIG, mesh=mesh), CHIPS["v5p"], DEVICE) == mesh


def test_what_takes_room():
    """bf16 parameters, and five arrays of each of a LoRA's factors in float32."""
    config = cached(flux_taca.CONFIG)
    one, two = (
        parameter_bytes(replace(config, lora=LoRAConfig(rank=rank)), DEVICE) for rank in (1, 2)
    )
    assert two - one == (one - 2 * 11_901_408_320)
    assert (two - one) % (5 * 4) == 0
