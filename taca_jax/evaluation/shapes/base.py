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
        if pixels != IMAGE_SIZE:
            raise UserError(
                f"pictures would have {pixels} pixels a side, and shapes are read at {IMAGE_SIZE}; "
                f"give a base of shapes, or height={IMAGE_SIZE} width={IMAGE_SIZE}"
            )
