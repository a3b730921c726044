"""Real photos in TAEF1's latents, through the same command as everything else."""

import dataclasses
import json
import shutil
import zipfile

import numpy as np
import pytest

from taca_jax.autoencoders.tiny_vae import TinyVAE
from taca_jax.convert.cli import main as convert
from taca_jax.data.config import DataConfig
from taca_jax.families.flux.model import FluxConfig
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.text.config import TextConfig
from taca_jax.text.t5 import T5Config
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.run import train
from tests.shared import shared_path
from tests.training.tiny import FLUX, tiny_config

RESOLUTION = 64
LATENT_FLUX: FluxConfig = dataclasses.replace(FLUX, patch_size=2, latent_channels=16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    with zipfile.ZipFile(shared_path("assets/dreambooth_512.zip")) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def taef1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "taef1"
    source = tmp_path_factory.mktemp("published")
    for part in ("encoder", "decoder"):
        name = f"taef1_{part}.safetensors"
        (source / name).symlink_to(shared_path(f"assets/tae/{name}"))
    convert(["tiny_vae", "--src", str(source), "--dst", str(folder)])
    return folder


def test_a_small_flux_trains_on_photos_samples_and_goes_on(photos, taef1, tmp_path):
    config = tiny_config(
        tmp_path / "run",
        steps=4,
        save_every=2,
        model=LATENT_FLUX,
        autoencoder=str(taef1),
        text=TextConfig("bytes", 32, T5Config(259, 32, 32, 2, 16, 1)),
        data=DataConfig(source=f"folder:{photos}", batch_size=2, resolution=RESOLUTION),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        sample_every=4,
        sample_prompts=("a photo of a backpack", "a photo of a dog"),
    )
    train(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 4
    assert all(0.3 < loss < 10 for loss in losses)  # noise alone has variance 1
    assert (tmp_path / "run" / "samples" / "0000004.png").is_file()

    pipeline = FluxPipeline.from_pretrained(tmp_path / "run" / "model", "float32")
    assert isinstance(pipeline.autoencoder, TinyVAE)
    drawn = pipeline("a photo of a backpack", steps=2, output="array")
    assert drawn.latents.shape == (1, RESOLUTION // 8, RESOLUTION // 8, 16)
    assert drawn.images.shape == (1, RESOLUTION, RESOLUTION, 3)
    assert np.isfinite(drawn.images).all()

    shutil.rmtree(tmp_path / "run" / "model")
    train(dataclasses.replace(config, resume=True))
    again = FluxPipeline.from_pretrained(tmp_path / "run" / "model", "float32")
    assert np.array_equal(
        again("a photo of a backpack", steps=2, output="array").images, drawn.images
    )
