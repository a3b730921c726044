"""Pictures as scorers take them, against transformers' preprocessing with PIL."""

import numpy as np
import pytest
from PIL import Image

from taca_jax.scorers.pixels import STD, blip_pixels, clip_pixels

SIZES = [(97, 64), (64, 97), (80, 80), (31, 40)]
"""With margins that two divides, or whose half transformers rounds as torchvision does."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "ours"), [("clip", clip_pixels), ("blip", blip_pixels)])
def test_pixels_are_those_of_transformers(size, name, ours):
    """Equal as 8-bit pixels; normalised they differ by the rounding of float32 alone."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    processors = {
        "clip": lambda: transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
        ),
        "blip": lambda: transformers.BlipImageProcessorPil(size={"height": 48, "width": 48}),
    }
    theirs = processors[name]()(picture, return_tensors="np")["pixel_values"][0]
    got = ours(picture, 48)
    assert got.shape == (48, 48, 3)
    assert got.dtype == np.float32
    assert np.abs(got - theirs.transpose(1, 2, 0)).max() * STD.max() * 255 < 1e-3


def test_the_middle_is_cut_out_by_clip_and_all_is_kept_by_blip():
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 255
    image = Image.fromarray(picture)
    assert clip_pixels(image, 20)[1:-1, 1:-1].min() > 1.5  # the white square alone
    assert blip_pixels(image, 20)[:, :4].max() < -1.0


def test_colours_are_read_from_any_mode():
    red = Image.new("P", (8, 8), 0)
    red.putpalette([255, 0, 0] * 256)
    np.testing.assert_array_equal(
        clip_pixels(red, 8), clip_pixels(Image.new("RGB", (8, 8), "red"), 8)
    )
