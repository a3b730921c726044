"""What is wrong with a command that draws is found before any weights are read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import generate
from taca_jax.autoencoders import vae_diffusers
from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.weights.folders import save_model
from taca_jax.weights.shipped import find_weights
from tests.models import in_layout
from tests.random_models import random_model
from tests.refusals import refusal
from tests.weights.small_flux import VAE, write_diffusers

SHAPES = {"--config": "shapes_taca", "prompt": "a red circle", "steps": "2"}
FLUX = {
    "--config": "flux_taca",
    "base": "flux",
    "lora": "none",
    "prompt": "a red circle",
    "height": "64",
    "width": "64",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole FLUX, copies that lack something, files that are damaged or of another model."""
    root = tmp_path_factory.mktemp("mistakes")
    flux = write_diffusers(root / "flux")
    lacking = {"no_text": "text_encoder_2", "no_tokenizer": "tokenizer_2", "no_vae": "vae"}
    for name, gone in lacking.items():
        shutil.copytree(flux, root / name)
        shutil.rmtree(root / name / gone)
    shutil.copytree(flux, root / "other_vae")
    other = replace(VAE, latent_channels=8)
    tensors = in_layout(vae_diffusers.TABLE, random_model(other))
    vae = root / "other_vae" / "vae"
    write_tensors(vae / "diffusion_pytorch_model.safetensors", tensors)
    (vae / "config.json").write_text(json.dumps(vae_diffusers.settings_of(other)))
    shutil.copytree(find_weights("shapes_base"), root / "cut")
    _cut(root / "cut" / "transformer" / "model.safetensors")
    shutil.copytree(find_weights("shapes_base"), root / "swapped")
    shutil.copy(
        root / "swapped" / "text_encoder" / "model.safetensors", root / "swapped" / "transformer"
    )
    save_model(root / "taef1", random_model(TAEF1))
    shutil.copy(find_weights("shapes_taca.safetensors"), root / "cut.safetensors")
    _cut(root / "cut.safetensors")
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    a, b = np.zeros((4, 3072), np.float32), np.zeros((3072, 4), np.float32)
    write_tensors(
        root / "flux.safetensors", {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    )
    write_tensors(root / "clip.safetensors", {"text_model.embeddings.weight": a})
    return root


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


MISTAKES = [
    (SHAPES, {"prompt": ""}, 'prompt is empty; say what to draw: prompt="a red circle"'),
    (SHAPES, {"out": "nowhere/x.png"}, "the folder nowhere does not exist"),
    (SHAPES, {"base": "nowhere"}, "nowhere is not there; give base= a folder"),
    (SHAPES, {"base": "cut"}, "model.safetensors is truncated or damaged"),
    (SHAPES, {"base": "swapped"}, "does not fit its config.json"),
    (SHAPES, {"prompt": "a red dragon"}, "the word 'dragon' is unknown to this model"),
    (SHAPES, {"negative_prompt": "a dragon", "guidance": "2"}, "the word 'dragon' is unknown"),
    (SHAPES, {"negative_prompt": "a dot", "guidance": "1"}, "acts with guidance above 1; it is 1"),
    (SHAPES, {"height": "42"}, "42 x 40 pixels: both must be multiples of 4"),
    (SHAPES, {"mesh.tensor": "2"}, "2 does not divide the 1 device"),
    (SHAPES, {"preview": "taef1"}, "taef1 has 16 latent channels, the transformer expects 3"),
    (SHAPES, {"preview": "flux/vae"}, "flux/vae is of a vae; previews take a tiny_vae"),
    (SHAPES, {"preview": "nowhere"}, "nowhere is not there; give an autoencoder's folder"),
    (SHAPES, {"lora": "nowhere.safetensors"}, "lora=nowhere.safetensors is not there; train it"),
    (SHAPES, {"lora": "cut.safetensors"}, "cut.safetensors is truncated or damaged"),
    (SHAPES, {"lora": "pointer.safetensors"}, "pointer.safetensors is truncated or damaged"),
    (SHAPES, {"lora": "clip.safetensors"}, "is no LoRA of "),
    (
        SHAPES,
        {"lora": "shapes_taca.safetensors,flux.safetensors"},
        "another model: 1 of its 1 layers do not fit: transformer.transformer_blocks.0.attn.to_q",
    ),
    (FLUX, {"negative_prompt": "x"}, "takes no negative prompt; leave negative_prompt out"),
    (FLUX, {"width": "66"}, "64 x 66 pixels: both must be multiples of 4"),
    (FLUX, {"base": "no_text"}, "this pipeline lacks a text encoder (FLUX"),
    (FLUX, {"base": "no_tokenizer"}, "tokenizer_2 is not there; it is the tokenizer of text_enco"),
    (FLUX, {"base": "no_vae"}, "no_vae has no autoencoder"),
    (FLUX, {"base": "other_vae"}, "has 8 latent channels, the transformer expects 4"),
    (FLUX, {"tokenizers": "other_vae/vae"}, "has no tokenizer nor tokenizer_2"),
    (FLUX, {"preview": "own"}, "previews are drawn by a tiny autoencoder (TAEF1"),
    (FLUX, {"tiling.above": "32", "tiling.size": "33", "tiling.overlap": "0"}, "multiples of 2"),
]


@pytest.mark.parametrize(("command", "changes", "message"), MISTAKES)
def test_a_mistake_is_found_before_weights_are_read(
    folder, tmp_path, monkeypatch, command, changes, message
):
    monkeypatch.chdir(folder)
    values = {"out": str(tmp_path / "x.png")} | command | changes
    words = (f"{key}={value}" for key, value in values.items())
    assert message in refusal(monkeypatch, generate.main, *words)
