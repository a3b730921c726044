"""Stable Diffusion 3 in others' layouts: diffusers' settings."""

from pathlib import Path

import pytest

from taca_jax.errors import UserError
from taca_jax.families.sd3 import diffusers
from taca_jax.formats.settings import Settings


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
