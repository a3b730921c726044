"""`python -m convert inspect` and `verify`: what they say, and what they refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.autoencoders import vae_original as vae_bfl
from taca_jax.families.flux import bfl as flux_bfl
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.weights.folders import load_config
from tests import models as tiny
from tests.convert.commands import original_t5, refused, run, said
from tests.models import FLUX, in_layout
from tests.random_models import random_model
from tests.shared import shared_path

VAE = replace(tiny.VAE, channels=(32, 64), groups=32)
"""As the original's code has it, and no shape."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A whole checkpoint as ComfyUI has them: transformer, autoencoder, something else."""
    file = tmp_path_factory.mktemp("checkpoint") / "all.safetensors"
    flux = in_layout(flux_bfl.TABLE, random_model(FLUX, param_dtype=jnp.bfloat16))
    vae = in_layout(vae_bfl.table_of(VAE), random_model(VAE))
    tensors = {f"model.diffusion_model.{name}": array for name, array in flux.items()}
    tensors |= {f"vae.{name}": array for name, array in vae.items()}
    write_tensors(file, tensors | {"text_encoders.x": np.zeros(3, np.float32)})
    return file


def test_a_checkpoint_of_several_models(checkpoint, capsys):
    lines = said(capsys, "inspect", checkpoint)
    layout = "a FLUX.1 transformer in Black Forest Labs' layout"
    assert f"under model.diffusion_model.: {layout}" in lines
    assert "MB of bfloat16" in lines
    assert "heads of 8 channels" in lines  # what the config lacks
    assert "under vae.: an autoencoder in its original layout" in lines
    assert "scale and shift of the latents are not in the file" in lines
    assert "1 other tensors: text_encoders.x" in lines


def test_what_shapes_do_not_tell_is_asked_for(checkpoint, tmp_path, capsys):
    where = ("--src", checkpoint, "--dst", tmp_path / "x")
    assert "give axes_dim" in refused(capsys, "flux", *where)
    assert "give latents, one of flux, sd3" in refused(capsys, "vae", *where)
    lines = said(capsys, "flux", *where, "--axes-dim", 2, 2, 4)
    assert "left out: 1 other tensors: text_encoders.x" in lines
    assert load_config(tmp_path / "x" / "transformer") == FLUX
    lines = said(capsys, "verify", *where)
    assert f"{tmp_path / 'x' / 'transformer'}: 126 tensors: 126 equal, 0 rounded to bf" in lines


def test_either_file_of_a_tiny_autoencoder(capsys):
    beginning = shared_path("assets/tae") / "taesd3"
    whole = said(capsys, "inspect", beginning)
    assert "taesd3: a tiny autoencoder as TAEF1 and TAESD3 are published" in whole
    for net in ("encoder", "decoder"):
        file = beginning.with_name(f"taesd3_{net}.safetensors")
        assert said(capsys, "inspect", file) == whole


def test_folders_of_originals_and_of_ours(tmp_path, capsys):
    original_t5(tmp_path / "src", shards=3)
    lines = said(capsys, "inspect", tmp_path / "src")
    assert f"{tmp_path / 'src'}: a T5 v1.1 encoder in transformers' layout" in lines
    assert "num_layers=2" in lines
    run("t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst", "--dtype", "float16")
    lines = said(capsys, "inspect", tmp_path / "dst")
    assert f"{tmp_path / 'dst'}: a model folder of kind t5" in lines
    assert "MB of float16" in lines
    where = ("--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert "21 tensors: 0 equal, 21 rounded to float16" in said(capsys, "verify", *where)


def test_pipelines(tmp_path, capsys):
    src = shared_path("golden/flux")
    lines = said(capsys, "inspect", src)
    assert f"{src}: a pipeline folder of diffusers" in lines
    assert f"{src / 'vae'}: an autoencoder in diffusers' layout" in lines
    run("flux", "--src", src, "--dst", tmp_path / "dst")
    lines = said(capsys, "inspect", tmp_path / "dst")
    assert f"{tmp_path / 'dst'}: a pipeline folder" in lines
    assert f"{tmp_path / 'dst' / 'transformer'}: a model folder of kind flux" in lines
    lines = said(capsys, "verify", "--src", src, "--dst", tmp_path / "dst")
    assert "transformer: 126 tensors: 126 equal" in lines
    assert "autoencoder: 240 tensors: 240 equal" in lines
    shutil.rmtree(tmp_path / "dst" / "autoencoder")
    where = ("--src", src, "--dst", tmp_path / "dst")
    assert "only one of" in refused(capsys, "verify", *where)


def test_loras(capsys):
    lines = said(capsys, "inspect", shared_path("golden/flux/lora"))
    assert "PEFT LoRA of 25 layers, rank 4, strength 1, on double_blocks (img.out" in lines


def test_things_that_are_nothing_known(tmp_path, capsys):
    assert "is not there" in refused(capsys, "inspect", tmp_path / "no")
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros(3)})
    assert "is nothing that is known: it has a" in refused(
        capsys, "inspect", tmp_path / "x.safetensors"
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "is of 'llama'; known are" in refused(capsys, "inspect", tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text(json.dumps({"_class_name": ["t5"]}))
    assert "is of ['t5']; known are" in refused(capsys, "inspect", tmp_path / "x")


def test_a_checkpoint_that_is_not_its_source(tmp_path, capsys):
    original_t5(tmp_path / "src")
    where = ("--src", tmp_path / "src", "--dst", tmp_path / "dst")
    run("t5", *where)
    file = tmp_path / "dst" / "model.safetensors"
    tensors, kernel = open_tensors(file), "blocks.attn.q.kernel"
    layers, *_ = tensors.shapes[kernel]
    stored = bytearray(file.read_bytes())
    second = tensors.stored[kernel].start + tensors.read(kernel).nbytes // layers
    stored[second + 3] ^= 0x80  # the sign of its first number
    file.write_bytes(stored)
    line = refused(capsys, "verify", *where)
    assert "1 of 21 tensors differ, most blocks.attn.q.kernel[1] (there encoder.block.1" in line
    file.write_bytes(stored[:-2])
    assert "is truncated or damaged" in refused(capsys, "verify", *where)

    settings = json.loads((tmp_path / "dst" / "config.json").read_text())
    (tmp_path / "dst" / "config.json").write_text(json.dumps(settings | {"num_heads": 1}))
    assert "num_heads is 1, there 2" in refused(capsys, "verify", *where)
