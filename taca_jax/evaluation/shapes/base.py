"""Whether a base draws pictures in which shapes can be read."""

from taca_jax.data.shapes.drawing import IMAGE_SIZE
from taca_jax.errors import UserError
from taca_jax.pipelines.config import SamplingConfig
from taca_jax.weights.pipeline_folders import open_pipeline


def check_base(config: SamplingConfig) -> None:
    """Raises UserError for a base that is not there, or draws pictures of another size than shapes
    have."""
    settings = open_pipeline(config.base).settings
    for side in (config.height, config.width):
        pixels = settings.resolution if side is None else side
        check_pixels(pixels, f"height={IMAGE_SIZE} width={IMAGE_SIZE}")


def check_pixels(side: int, instead: str) -> None:
    """Raises UserError unless shapes can be read in pictures of so many pixels a side; `instead` is
    what may be set otherwise."""
    if side != IMAGE_SIZE:
        raise UserError(
            f"pictures would have {side} pixels a side, and shapes are read at {IMAGE_SIZE}; "
            f"give a base of shapes, or {instead}"
        )
