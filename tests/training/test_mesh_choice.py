"""Where parameters are whole on each device, and where they are shared; of released models."""

from dataclasses import replace

import jax
import pytest

from configs import flux_taca, sd35_taca
from taca_jax.nn.lora import LoRAConfig
from taca_jax.parallel.chips import CHIPS
from taca_jax.parallel.choice import settled
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.training.models import open_models

WHOLE, SHARED = MeshConfig(data=-1, fsdp=1), MeshConfig()
DEVICE = jax.devices()[0]


def cached(config):
    return replace(config, data=replace(config.data, encode="cache"))


def parameter_bytes(config):
    return open_models(config, published=True).parameter_bytes(DEVICE)


def settled_mesh(config, chip):
    return settled(config.mesh, CHIPS[chip], lambda: parameter_bytes(config))


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
    assert settled_mesh(config, chip) == mesh


def test_tensor_parallel_devices_have_room_together():
    config = replace(cached(flux_taca.CONFIG), mesh=MeshConfig(tensor=4))
    assert settled_mesh(config, "v6e") == MeshConfig(data=-1, fsdp=1, tensor=4)


def test_what_is_asked_for_is_left_alone():
    for mesh in (MeshConfig(fsdp=-1), MeshConfig(data=2), MeshConfig(tensor=-1)):
        assert settled_mesh(replace(flux_taca.CONFIG, mesh=mesh), "v5p") == mesh


def test_what_takes_room():
    """bf16 parameters, and five arrays of each of a LoRA's factors in float32."""
    config = cached(flux_taca.CONFIG)
    one, two = (parameter_bytes(replace(config, lora=LoRAConfig(rank=rank))) for rank in (1, 2))
    assert two - one == (one - 2 * 11_901_408_320)
    assert (two - one) % (5 * 4) == 0
