"""Pixels as latents: normalised on the way in, and exactly undone on the way out."""

import math

import jax
import numpy as np
import pytest

from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.errors import UserError
from taca_jax.nn.kinds import flat_params


def test_latents_are_the_normalised_pictures_and_decode_to_them():
    images = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1, maxval=1)
    pixels = Pixels(PixelsConfig(shift_factor=0.5, scaling_factor=4.0))
    latents = pixels.encode(images)
    np.testing.assert_allclose(latents, (np.asarray(images) - 0.5) * 4.0, rtol=1e-6)
    np.testing.assert_allclose(pixels.decode(latents), images, atol=1e-6)
    assert not flat_params(pixels)


def test_by_default_latents_are_the_pictures_to_the_bit():
    images = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1, maxval=1)
    np.testing.assert_array_equal(Pixels().encode(images), images)
    np.testing.assert_array_equal(Pixels().decode(images), images)


@pytest.mark.parametrize(
    ("shift", "scale", "message"),
    [
        (math.nan, 1.0, "pixels.shift_factor is nan; it must be finite"),
        (-math.inf, 1.0, "pixels.shift_factor is -inf; it must be finite"),
        (0.0, 0.0, "pixels.scaling_factor is 0.0; it must be positive and finite"),
        (0.0, -2.0, "pixels.scaling_factor is -2.0; it must be positive and finite"),
        (0.0, math.inf, "pixels.scaling_factor is inf; it must be positive and finite"),
        (0.0, math.nan, "pixels.scaling_factor is nan; it must be positive and finite"),
    ],
)
def test_a_normalisation_with_no_way_back_is_refused(shift, scale, message):
    with pytest.raises(UserError) as refusal:
        PixelsConfig(shift, scale)
    assert str(refusal.value) == message
