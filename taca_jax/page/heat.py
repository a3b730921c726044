"""Maps of attention over pictures."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from taca_jax.pipelines.grids import enlarged

_COLORS = np.array(
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32
)
"""From little to much attention: five of Matplotlib's `inferno`, evenly apart."""

_LEAST_OPACITY, _MOST_OPACITY = 0.3, 0.85
"""Of the colours of the least and of the most attention."""


def heated(
    pictures: Sequence[Image.Image], maps: Sequence[Float[np.ndarray, "r c"]]
) -> list[Image.Image]:
    """Maps over pale pictures, small ones enlarged; all on one scale, from the least to the most of
    any of them."""
    low, high = min(each.min() for each in maps), max(each.max() for each in maps)
    span = max(high - low, np.finfo(np.float32).tiny)
    return [
        _heated(enlarged(picture), (values - low) / span)
        for picture, values in zip(pictures, maps, strict=True)
    ]


def _heated(picture: Image.Image, values: Float[np.ndarray, "r c"]) -> Image.Image:
    """values: 0 to 1."""
    smooth = np.asarray(
        Image.fromarray(values.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    )
    at = np.linspace(0, 1, len(_COLORS))
    colors = np.stack([np.interp(smooth, at, each) for each in _COLORS.T], axis=-1)
    opacity = np.interp(smooth, [0, 1], [_LEAST_OPACITY, _MOST_OPACITY])[..., None]
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    return Image.fromarray((opacity * colors + (1 - opacity) * grey).round().astype(np.uint8))
