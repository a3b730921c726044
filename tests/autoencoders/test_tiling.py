"""Pictures in overlapping squares: how far they are from those at once, and that no seam shows."""

import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from taca_jax.autoencoders.tiling import Tiling, decode_in_tiles
from taca_jax.autoencoders.vae import upsample_nearest
from taca_jax.errors import UserError
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.originals import Original, tiny_vae, vae
from tests.compare import relative_error
from tests.shared import shared_path


@pytest.mark.parametrize("shape", [(1, 40, 24), (2, 17, 16), (1, 8, 33), (1, 11, 11)])
def test_what_looks_at_single_positions_is_the_same_in_squares(shape):
    latents = np.random.default_rng(0).standard_normal((*shape, 3), np.float32)
    tiling = Tiling(above=0, size=24, overlap=8)  # 12 and 4 latents
    shapes = set()

    def decode(square):
        shapes.add(square.shape)
        return upsample_nearest(square)

    images = decode_in_tiles(decode, jnp.asarray(latents), tiling, 2)
    np.testing.assert_allclose(images, upsample_nearest(jnp.asarray(latents)), atol=1e-6)
    assert shapes == {(1, min(12, shape[1]), min(12, shape[2]), 3)}  # one program for all


def test_the_rim_of_a_square_does_not_count():
    """Within a quarter of the overlap; there a decoder sees zeros instead of the neighbour."""
    tiling = Tiling(above=0, size=16, overlap=8)

    def decode(square):
        rim = jnp.ones(square.shape).at[:, 2:-2, 2:-2].set(0)
        return square + 100 * rim

    images = decode_in_tiles(decode, jnp.zeros((1, 40, 16, 1)), tiling, 1)
    inside = images[0, 2:-2, 2:-2]
    assert not inside.any()
    assert images[0, 0, 0] == 100


def test_squares_that_overlap_by_half_add_up():
    ones = decode_in_tiles(lambda x: x, jnp.ones((1, 25, 25, 1)), Tiling(0, 16, 8), 1)
    np.testing.assert_allclose(ones, 1, atol=1e-6)


def test_which_pictures_are_tiled():
    assert not Tiling().is_for(1024, 1024)
    assert not Tiling().is_for(1536, 1536)
    assert Tiling().is_for(2048, 1536)
    assert Tiling(above=0, size=512, overlap=0).is_for(8, 520)
    assert not Tiling(above=0, size=512, overlap=0).is_for(512, 512)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlap": 513}, "tiling.overlap is 513; it must be 0 to 512, half of tiling.size=1024"),
        ({"overlap": -8}, "tiling.overlap is -8; it must be"),
        ({"above": -1}, "tiling.above is -1; it must be 0"),
    ],
)
def test_sizes_that_do_not_fit(values, message):
    with pytest.raises(UserError, match=message):
        Tiling(**values)
    with pytest.raises(UserError, match=r"size is 100 and .*; this autoencoder takes multiples of"):
        Tiling(size=100, overlap=0).in_latents(8)


def compiled(source: Original):
    """Encoder and decoder of original weights."""
    graph, state = nnx.split(source.load(LoadOptions(jnp.float32, param_dtype=jnp.float32)))
    return (
        jax.jit(lambda x: nnx.merge(graph, state).encode(x)),
        jax.jit(lambda x: nnx.merge(graph, state).decode(x)),
    )


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A photograph of 512 x 512, `[1, h, w, 3]` in [-1, 1]."""
    with zipfile.ZipFile(shared_path("assets/dreambooth_512.zip")) as archive:
        data = archive.read("dataset/backpack/00.jpg")
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32)[None] / 127.5 - 1


@pytest.fixture(scope="module")
def taef1():
    return compiled(tiny_vae(shared_path("assets/tae") / "taef1"))


TILING = Tiling(above=0, size=384, overlap=96)
"""Of 512 px: two squares a side, that share 256 px."""
BLENDED = slice(192, 320)
"""Where their weights change."""


@pytest.mark.slow
def test_a_decoder_without_norms_is_the_same_in_squares(photo, taef1):
    """The published TAEF1: its squares agree but for what its convolutions see beyond 64 px."""
    encode, decode = taef1
    latents = encode(photo)
    difference = decode_in_tiles(decode, latents, TILING, 8) - np.asarray(decode(latents))
    print(f"TAEF1: {np.abs(difference).max():.1e} at most, {np.abs(difference).mean():.1e} mean")
    assert np.abs(difference).mean() < 2e-4
    assert np.abs(difference).max() < 2 / 255  # one level of 8 bits


@pytest.mark.slow
def test_group_norms_differ_by_square_and_show_no_seam(photo, taef1):
    """The autoencoder's structure with random weights, which follow their norms' statistics more
    than trained ones do, on the latents of a photograph and on noise, whose statistics are the same
    in every square."""
    _, decode = compiled(vae(shared_path("golden/flux_bfl/ae.safetensors"), "flux"))
    latents = taef1[0](photo)
    whole = np.asarray(decode(latents))
    tiled = decode_in_tiles(decode, latents, TILING, 8)
    noise = jax.random.normal(jax.random.key(0), latents.shape)
    of_noise = relative_error(decode_in_tiles(decode, noise, TILING, 8), decode(noise))
    print(f"photograph {relative_error(tiled, whole):.3f}, noise {of_noise:.3f}")
    assert relative_error(tiled, whole) < 0.4
    assert of_noise < 0.1
    for axis in (1, 2):
        # A seam is a row or column where the picture changes more than the picture at once does,
        # and more so than where there is no edge.
        jumps = np.abs(np.diff(tiled - whole, axis=axis)).mean(axis=(0, 3 - axis, 3))
        edges = [jumps[edge - 2 : edge + 2].max() for edge in (128, 384)]
        print(f"axis {axis}: at edges {edges}, elsewhere up to {jumps.max()}")
        assert max(edges) < np.median(jumps) * 1.5
        assert jumps[BLENDED].max() <= 1.1 * np.delete(jumps, BLENDED).max()
