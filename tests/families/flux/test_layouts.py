"""FLUX in others' layouts: its sizes from settings, and from the shapes of single files."""

from dataclasses import replace
from pathlib import Path

import pytest

from taca_jax.errors import UserError
from taca_jax.families.flux import bfl, diffusers
from taca_jax.families.flux.model import FLUX_DEV, FLUX_SCHNELL
from taca_jax.formats.scheduler import schedule_of
from taca_jax.formats.settings import Settings, read_settings
from taca_jax.sampling.schedule import FlowSchedule
from tests.models import FLUX, layout_shapes, shapes_alone
from tests.shared import shared_path


def test_flux_settings_both_ways():
    config = diffusers.config_of(read_settings(shared_path("golden/flux/transformer")))
    again = diffusers.config_of(Settings(Path("x"), diffusers.settings_of(config)))
    assert again == config
    assert (config.latent_channels, config.patch_size, config.head_dim) == (16, 2, 32)
    with pytest.raises(UserError, match=r"mlp_ratio.*diffusers' FLUX knows only"):
        diffusers.settings_of(replace(FLUX, mlp_ratio=2.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name 'SD3Transformer2DModel'; only"),
        ({"in_channels": 384, "out_channels": 64}, "out_channels 64; only 384 is supported"),
        ({"in_channels": 6}, "in_channels 6; expected a multiple of 4"),
        ({"num_layers": "two"}, "num_double_blocks"),
        ({"num_layers": None}, "num_double_blocks"),
        ({"axes_dims_rope": [2, 2, 2]}, "axes_dim"),
        ({"in_channels": "64"}, "in_channels '64'; expected an integer"),
    ],
)
def test_flux_settings_that_are_not_ours(change, words):
    with pytest.raises(UserError, match=words):
        diffusers.config_of(
            Settings(Path("x/config.json"), {**diffusers.settings_of(FLUX), **change})
        )


def test_schedule():
    settings = read_settings(shared_path("golden/flux/scheduler"), "scheduler_config.json")
    assert schedule_of(settings) == FlowSchedule()
    constant = {**settings.fields, "use_dynamic_shifting": False, "shift": 1.0}
    assert schedule_of(Settings(Path("x"), constant)) == FlowSchedule(shift=1.0)
    with pytest.raises(UserError, match="use_karras_sigmas True; only False"):
        schedule_of(Settings(Path("x"), {**constant, "use_karras_sigmas": True}))


def test_sizes_of_black_forest_labs_files():
    for config in (FLUX_DEV, FLUX_SCHNELL):
        tensors = shapes_alone(layout_shapes(bfl.TABLE, config))
        assert bfl.is_flux(tensors)
        assert bfl.inferred(tensors) == config
    assert bfl.inferred(shapes_alone(layout_shapes(bfl.TABLE, FLUX)), FLUX.axes_dim) == FLUX


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "heads of 8 channels, .* give axes_dim, three even numbers that sum to 8"),
        ({"img_in.weight": (16, 20)}, "takes 20 channels and gives 16; .* like Fill"),
        ({"img_in.weight": (20, 16)}, "20 channels in heads of 8"),
        ({"txt_in.weight": (16,)}, r"txt_in.weight is \(16,\); expected 2 axes"),
    ],
)
def test_sizes_that_shapes_do_not_tell(change, words):
    with pytest.raises(UserError, match=words):
        bfl.inferred(shapes_alone(layout_shapes(bfl.TABLE, FLUX) | change))
