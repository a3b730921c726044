"""Grids of pictures: every picture where its caption is."""

import numpy as np
import pytest
from PIL import Image

from taca_jax.pipelines.grids import caption_grid, enlarged

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def solid(color, size=(40, 40)):
    return Image.new("RGB", size, color)


def corner(grid, color):
    """The left top corner and the size of the area of a colour."""
    rows, columns = np.nonzero((np.asarray(grid) == color).all(axis=-1))
    size = (np.ptp(columns) + 1, np.ptp(rows) + 1)
    assert len(rows) == size[0] * size[1]  # a rectangle
    return (columns.min(), rows.min()), size


def test_pictures_stand_in_rows_enlarged_by_whole_pixels():
    grid = caption_grid([solid(c) for c in COLORS], ["a"] * 5, columns=2)
    places = [corner(grid, color) for color in COLORS]
    assert {size for _, size in places} == {(520, 520)}
    lefts, tops = zip(*(place for place, _ in places), strict=True)
    assert lefts[0] == lefts[2] == lefts[4] < lefts[1] == lefts[3]
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]


def test_large_pictures_keep_their_size():
    grid = caption_grid([solid(COLORS[0], (300, 100))], [""])
    assert corner(grid, COLORS[0])[1] == (300, 100)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((40, 40), (520, 520)), ((20, 80), (140, 560)), ((255, 8), (765, 24)), ((1, 1), (512, 512))],
)
def test_small_pictures_are_enlarged_pixel_by_pixel(size, shown):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    large = enlarged(Image.fromarray(pixels))
    assert large.size == shown
    factor = shown[0] // size[0]
    np.testing.assert_array_equal(large, pixels.repeat(factor, axis=0).repeat(factor, axis=1))


@pytest.mark.parametrize("size", [(256, 8), (16, 300), (1024, 1024)])
def test_large_pictures_are_what_they_were(size):
    picture = solid(COLORS[0], size)
    assert enlarged(picture) is picture


def test_four_columns_at_most_by_itself():
    grid = caption_grid([solid(c) for c in COLORS], [""] * 5)
    tops = [corner(grid, color)[0][1] for color in COLORS]
    assert len(set(tops[:4])) == 1
    assert tops[4] > tops[0]


def test_captions_and_headings_are_written_and_make_room():
    plain = caption_grid([solid(COLORS[0])], [""])
    captioned = caption_grid([solid(COLORS[0])], ["several words " * 10])
    headed = caption_grid([solid(COLORS[0])], [""], headings=["plain"])
    assert captioned.height > plain.height
    assert headed.height > plain.height
    for grid in (captioned, headed):
        assert (np.asarray(grid.convert("L")) < 64).sum() > 20  # black ink; red is 76
    assert (np.asarray(plain.convert("L")) < 64).sum() == 0


def test_long_words_do_not_hang_it():
    assert caption_grid([solid(COLORS[0])], ["x" * 500]).width == 520 + 16


def test_other_modes_become_rgb():
    grid = caption_grid([Image.new("L", (40, 40), 0), solid(COLORS[1])], ["", ""])
    assert grid.mode == "RGB"


def test_every_picture_has_a_caption():
    with pytest.raises(ValueError, match="1 pictures and 2 captions; give one each"):
        caption_grid([solid(COLORS[0])], ["a", "b"])
    with pytest.raises(ValueError, match="0 pictures and 0 captions"):
        caption_grid([], [])
