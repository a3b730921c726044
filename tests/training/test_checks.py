"""What is wrong with a run is found before any weights are read."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.training.cache_stage import ready_cache
from taca_jax.training.checks import check_run
from taca_jax.training.config import TrainConfig
from taca_jax.training.signals import Notice
from taca_jax.weights.folders import save_model
from taca_jax.weights.pipeline_folders import open_pipeline, write_settings
from taca_jax.weights.shipped import find_weights
from tests.random_models import random_model
from tests.refusals import refusal
from tests.training.tiny import lora_changes, tiny_config, tiny_pipeline
from tests.weights import small_sd3
from tests.weights.small_flux import write_diffusers

ROOT = Path(__file__).resolve().parents[2]
LORA = {
    "--config": "shapes_taca",
    "base": "base",
    "data.source": "folder:good",
    "data.batch_size": "4",
    "evaluate": "none",
}
FLUX = LORA | {"base": "flux", "data.resolution": "64"}
CACHED = {"data.encode": "cache", "data.cache": "cache"}


def write_pictures(folder: Path, *, side: int = 48, caption: str | None = "a red circle") -> None:
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (side, side), (60 * i, 0, 0)).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption)


def cached_run(root: Path, base: Path) -> TrainConfig:
    config = tiny_config(root / "unused", **lora_changes(str(base)))
    cache = {"encode": "cache", "cache": str(root / "cache"), "resolution": 64}
    return replace(config, data=replace(config.data, source=f"folder:{root / 'good'}", **cache))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Bases, pictures, LoRAs, a cache and folders of results, with all that may be wrong."""
    root = tmp_path_factory.mktemp("mistakes")
    tiny_pipeline().save(root / "base")
    shutil.copytree(root / "base", root / "cut")
    file = root / "cut" / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    shutil.copytree(root / "base", root / "large")
    write_settings(root / "large", replace(open_pipeline(root / "base").settings, resolution=64))
    flux = write_diffusers(root / "flux")
    lacking = {"no_text": "text_encoder_2", "no_tokenizer": "tokenizer_2", "no_vae": "vae"}
    for name, gone in lacking.items():
        shutil.copytree(flux, root / name)
        shutil.rmtree(root / name / gone)
    small_sd3.write_diffusers(root / "sd3")
    save_model(root / "taef1", random_model(TAEF1))
    layer = "transformer.transformer_blocks.0.attn.to_q"
    for width, rank in ((32, 8), (3072, 4)):
        a, b = np.zeros((rank, width), np.float32), np.zeros((width, rank), np.float32)
        factors = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        write_tensors(root / f"width{width}.safetensors", factors)
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (root / "empty").mkdir()
    write_pictures(root / "good")
    write_pictures(root / "silent", caption=None)
    write_pictures(root / "dogs", caption="a dog")
    (root / "results").mkdir()
    (root / "results" / "config.json").write_text("{}")
    run = check_run(cached_run(root, flux))
    assert len(ready_cache(run.models, Notice(""), run.data)) == 4
    return root


MISTAKES = [
    (LORA, {"out_dir": "results"}, "results holds a run already; resume=true goes on"),
    (LORA, {"out_dir": "good/0.png/run"}, "good/0.png is a file); write elsewhere"),
    (LORA, {"base": "nowhere"}, "nowhere is not there; give base= a folder"),
    (LORA, {"base": "cut"}, "cut/text_encoder/model.safetensors is truncated or damaged"),
    (LORA, {"data.source": "folder:nowhere"}, "nowhere does not exist; data.source=folder:PATH"),
    (LORA, {"data.source": "folder:empty"}, "empty holds no pictures"),
    (LORA, {"data.source": "folder:silent"}, "without a caption (in captions.jsonl, or a .txt"),
    (LORA, {"data.source": "folder:dogs"}, "the word 'dog' is unknown to this model"),
    (LORA, {"data.source": "webdataset:no/{0..3}.tar"}, "of which 4 are not there"),
    (LORA, {"data.source": "tfds:shapes/huge"}, "huge"),
    (LORA, {"data.min_side": "49"}, "none of 4 pictures has sides of data.min_side=49"),
    (LORA, {"data.resolution": "42"}, "data.resolution is 42; this model takes multiples of 4"),
    (LORA, {"data.latents": "sample"}, "makes one latent of a picture: set data.latents=mean"),
    (LORA, {"autoencoder": "taef1"}, "the autoencoder has 16 latent channels, the transformer"),
    (LORA, {"lora.targets": "nothing"}, "lora.targets match no layer of this model: nothing"),
    (LORA, {"lora.targets": "("}, "lora.targets has (, which is no regular expression"),
    (LORA, {"lora.init": "nowhere.safetensors"}, "nowhere.safetensors is not there"),
    (LORA, {"lora.init": "pointer.safetensors"}, "pointer.safetensors is truncated or damaged"),
    (LORA, {"mesh.tensor": "2"}, "2 does not divide the 1 device"),
    (LORA, {"sample_every": "1", "sample_prompts": "a dog"}, "the word 'dog' is unknown"),
    (LORA, CACHED | {"data.cache": "good"}, "good is not empty and no cache"),
    (FLUX, CACHED | {"data.source": "folder:dogs"}, "cache was made with data.source=folder:"),
    (
        LORA,
        {"evaluate.prompts": "1", "base": "large", "data.source": "generated:shapes/8"},
        "pictures would have 64 pixels a side, and shapes are read at 40; give a base of shapes",
    ),
    (FLUX, {"base": "no_text"}, "base=no_text lacks text encoders (FLUX.1 has CLIP and T5)"),
    (FLUX, {"base": "no_tokenizer"}, "no_tokenizer/tokenizer_2 is not there; it is the tokenizer"),
    (
        FLUX,
        {"base": "sd3", "data.resolution": "128"},
        "this model has positions for 8 x 8 at most: take a smaller one; lower data.resolution",
    ),
    (FLUX, {"base": "no_vae"}, "base=no_vae lacks an autoencoder (autoencoder=FOLDER)"),
]


@pytest.mark.parametrize(("command", "changes", "message"), MISTAKES)
def test_a_mistake_is_found_before_weights_are_read(
    folder, tmp_path, monkeypatch, command, changes, message
):
    monkeypatch.chdir(folder)
    values = {"out_dir": str(tmp_path / "run")} | command | changes
    if "evaluate.prompts" in changes:
        del values["evaluate"]
    words = (f"{key}={value}" for key, value in values.items())
    assert message in refusal(monkeypatch, train.main, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("width32", "is of rank 8, and lora.rank is 4; set lora.rank=8 or more"),
        ("width3072", "is a LoRA of another model: 1 of its 1 layers do not fit"),
    ],
)
def test_a_lora_to_start_from_is_read_but_nothing_else_is(folder, tmp_path, name, message):
    """It is small, and what it has of ranks shows only in its values."""
    config = tiny_config(tmp_path, **lora_changes(str(folder / "cut")))
    lora = replace(config.lora, rank=4, init=str(folder / f"{name}.safetensors"))
    with pytest.raises(Exception, match=message):
        check_run(replace(config, lora=lora))


def test_a_cache_of_another_kind_of_model_is_refused(folder, tmp_path):
    flux = shutil.copytree(folder / "flux", tmp_path / "flux")
    config = cached_run(folder, flux)
    assert check_run(config).data is None  # complete; other weights would show in their values
    file = flux / "vae" / "config.json"
    file.write_text(file.read_text().replace('"shift_factor": 0.1159', '"shift_factor": 0.5'))
    with pytest.raises(Exception, match="cache was made with another autoencoder"):
        check_run(config)


def test_a_process_refuses_before_it_imports_what_trains():
    """Orbax, grain, SciPy and TensorBoard take longer than the checks."""
    code = (
        "import sys, train\n"
        "try: train.main()\n"
        "finally: print({'orbax', 'grain', 'scipy', 'tensorboardX'} & {*sys.modules})"
    )
    values = ["--config", "shapes_taca", "data.source=folder:nowhere", "evaluate=none"]
    done = subprocess.run(
        [sys.executable, "-c", code, *values],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout == "set()\n"
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere does not exist")
    assert done.stderr.count("\n") == 1


def test_the_shipped_base_fits_its_config():
    for model in open_pipeline(find_weights("shapes_base")).models.values():
        model.check()
