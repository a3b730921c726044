"""Continues `shapes_base` at higher noise levels, where captions are learnt."""

from dataclasses import replace

from configs.shapes_base import CONFIG as STAGE1
from taca_jax import TextConfig
from taca_jax.autoencoders.pixels import PixelsConfig

CONFIG = replace(
    STAGE1,
    name="shapes_base_stage2",
    base="runs/shapes_base/model",
    model=None,
    text=TextConfig(),
    pixels=PixelsConfig(),
    timestep_shift=3.0,
    seed=1,
)
