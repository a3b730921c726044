"""What the samples of a run are drawn with, and whether its model can draw them so."""

from taca_jax.errors import UserError
from taca_jax.pipelines.inputs import check_guidance
from taca_jax.training.models import RunModels


def check_samples(models: RunModels) -> None:
    """Raises UserError for samples that cannot be drawn: their size, their guidance."""
    config = models.config
    if not config.sample_every:
        return
    height, width = sample_size(models)
    multiple = models.multiple
    for name, side in {"sample_height": height, "sample_width": width}.items():
        if side % multiple:
            raise UserError(f"{name} is {side}; this model draws multiples of {multiple} pixels")
    try:
        models.family.check_grid(models.transformer, height // multiple, width // multiple)
    except UserError as error:
        raise UserError(f"samples of {height} x {width} pixels: {error}") from None
    check_guidance(sample_guidance(models))


def sample_size(models: RunModels) -> tuple[int, int]:
    """The (height, width) of a run's samples, in pixels."""
    config = models.config
    side = config.data.resolution
    return config.sample_height or side, config.sample_width or side


def sample_guidance(models: RunModels) -> float:
    """The strength of guidance of a run's samples."""
    given = models.config.sample_guidance
    return models.stored.settings.guidance if given is None else given
