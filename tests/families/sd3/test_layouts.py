"""Stable Diffusion 3 in others' layouts: its sizes from settings and from a file's shapes."""

from pathlib import Path

import pytest

from taca_jax.errors import UserError
from taca_jax.families.sd3 import diffusers, stability
from taca_jax.families.sd3.model import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from taca_jax.formats.settings import Settings
from tests.models import layout_shapes, shapes_alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_attention_heads": None, "attention_head_dim": 64},
            "num_attention_heads None; expected an integer",
        ),
        (
            {
                "num_attention_heads": 2,
                "attention_head_dim": 4,
                "in_channels": 16,
                "dual_attention_layers": 3,
            },
            "dual_attention_layers 3; expected a list",
        ),
    ],
)
def test_settings_of_another_type(fields, message):
    with pytest.raises(UserError, match=message):
        diffusers.config_of(Settings(Path("x"), fields))


@pytest.mark.parametrize("config", [SD35_MEDIUM, SD35_LARGE, SD3_MEDIUM])
def test_the_size_of_a_single_file_is_in_its_shapes(config):
    tensors = shapes_alone(layout_shapes(stability.table_of(config), config))
    assert stability.is_sd3(tensors)
    assert stability.inferred(tensors) == config
