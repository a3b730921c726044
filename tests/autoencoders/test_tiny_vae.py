"""Tiny autoencoder: against diffusers' AutoencoderTiny with the published weights of both."""

import io
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.autoencoders.tiny_vae import TAEF1, TinyVAE
from taca_jax.autoencoders.tiny_vae_layout import TABLE, open_taesd
from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import write_tensors
from tests.compare import relative_error
from tests.models import TINY_VAE, from_layout
from tests.random_models import random_model
from tests.shared import shared_path


def original(name: str):
    """AutoencoderTiny with the published weights, whose decoder counts the clamp as a layer."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import load_file as load_torch

    folder = shared_path("assets/tae")
    model = diffusers.AutoencoderTiny(latent_channels=16).eval()
    weights = {}
    for key, array in load_torch(folder / f"{name}_encoder.safetensors").items():
        weights[f"encoder.layers.{key}"] = array.float()
    for key, array in load_torch(folder / f"{name}_decoder.safetensors").items():
        index, rest = key.split(".", 1)
        weights[f"decoder.layers.{int(index) - 1}.{rest}"] = array.float()
    model.load_state_dict(weights)
    return torch, model


@nnx.jit
def encode(model: TinyVAE, images):
    return model.encode(images)


@nnx.jit
def decode(model: TinyVAE, latents):
    return model.decode(latents)


def ours(name: str, dtype=jnp.float32) -> TinyVAE:
    tensors = open_taesd(shared_path("assets/tae") / name)
    return from_layout(TABLE, tensors, TAEF1, dtype=dtype)


@pytest.mark.parametrize("name", ["taef1", "taesd3"])
def test_matches_diffusers(name):
    torch, theirs = original(name)
    model = ours(name)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 40, 24, 3)).astype(np.float32)
    latents = rng.normal(0, 2, (2, 5, 3, 16)).astype(np.float32)
    with torch.no_grad():
        nchw = torch.as_tensor(images).permute(0, 3, 1, 2)
        encoded = theirs.encode(nchw).latents.permute(0, 2, 3, 1)
        nchw = torch.as_tensor(latents).permute(0, 3, 1, 2)
        decoded = theirs.decode(nchw).sample.permute(0, 2, 3, 1)
    assert relative_error(encode(model, jnp.asarray(images)), encoded) <= 1e-5
    assert relative_error(decode(model, jnp.asarray(latents)), decoded) <= 1e-5


@pytest.mark.parametrize("name", ["taef1", "taesd3"])
def test_photos_survive_and_their_latents_have_the_scale_of_the_denoiser(name):
    """Raw FLUX latents would have a deviation of about 1 / 0.3611, raw SD3 ones 1 / 1.5305."""
    model = ours(name)
    images = jnp.asarray(photos(4, 128))
    latents = encode(model, images)
    assert latents.shape == (4, 16, 16, 16)
    assert 0.75 < float(latents.std()) < 1.3
    error = jnp.clip(decode(model, latents), -1, 1) - images
    assert float(jnp.sqrt(jnp.mean(error**2))) < 0.12


def test_bfloat16_computes_close_to_float32():
    images = jnp.asarray(photos(4, 128))
    latents = encode(ours("taef1"), images)
    assert relative_error(encode(ours("taef1", jnp.bfloat16), images), latents) < 0.03


def photos(count: int, size: int) -> np.ndarray:
    from PIL import Image

    with zipfile.ZipFile(shared_path("assets/dreambooth_512.zip")) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith((".jpg", ".png", ".webp")))
        names = names[:: len(names) // count][:count]
        pictures = [
            np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB").resize((size, size)))
            for n in names
        ]
    return np.stack(pictures).astype(np.float32) / 127.5 - 1


def test_arrays_that_do_not_fit_are_refused():
    model = random_model(TINY_VAE)
    with pytest.raises(UserError, match=r"5 x 4.*multiples of 2"):
        model.encode(jnp.zeros((1, 5, 4, 3)))
    with pytest.raises(UserError, match=r"uint8.*\[-1, 1\]"):
        model.encode(jnp.zeros((1, 4, 4, 3), jnp.uint8))
    with pytest.raises(UserError, match=r"expected \[b, h, w, 4\]"):
        model.decode(jnp.zeros((1, 4, 2, 2)))


def test_decoder_limits_extreme_latents():
    model = random_model(TINY_VAE)
    far, farther = (decode(model, jnp.full((1, 2, 2, 4), value)) for value in (1e3, 1e6))
    np.testing.assert_allclose(far, farther, atol=1e-5)


def test_pairs_of_files(tmp_path):
    with pytest.raises(UserError, match=r"should have one pair .* found none"):
        open_taesd(tmp_path)
    write_tensors(tmp_path / "a_encoder.safetensors", {"0.weight": np.zeros(3)})
    with pytest.raises(UserError, match=r"a_decoder\.safetensors is not there"):
        open_taesd(tmp_path)
    write_tensors(tmp_path / "a_decoder.safetensors", {"1.weight": np.zeros(3)})
    assert set(open_taesd(tmp_path).shapes) == {"encoder.0.weight", "decoder.1.weight"}
    with pytest.raises(UserError, match=r"encoder\.0\.weight is \(3,\) instead of \(64, 3, 3, 3\)"):
        from_layout(TABLE, open_taesd(tmp_path), TAEF1)
    write_tensors(tmp_path / "b_encoder.safetensors", {"0.weight": np.zeros(3)})
    with pytest.raises(UserError, match="found a, b"):
        open_taesd(tmp_path)
