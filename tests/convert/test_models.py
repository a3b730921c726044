"""`python -m convert` of models: what it makes, and what it refuses without leaving a trace."""

import json
import resource
import shutil
from dataclasses import asdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from taca_jax.autoencoders import vae_diffusers as vae
from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params, shapes_of
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text.tokenizers import load_tokenizer
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests.convert.commands import only, original_clip, original_t5, refused, run
from tests.models import T5, in_layout
from tests.shared import shared_path


@pytest.mark.parametrize("shards", [1, 3])
def test_single_and_sharded_files_give_the_same_model(tmp_path, shards, capsys):
    model = original_t5(tmp_path / "src", shards)
    run("t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    again = load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32))
    assert again.config == T5
    for name, param in flat_params(model).items():
        np.testing.assert_array_equal(flat_params(again)[name].get_value(), param.get_value())
    assert f"{tmp_path / 'dst'}: " in capsys.readouterr().out
    stored = load_file(tmp_path / "dst" / "model.safetensors")  # by the library that others use
    assert {name: array.shape for name, array in stored.items()} == shapes_of(T5)
    np.testing.assert_array_equal(stored["final_norm.scale"], model.final_norm.scale[...])


def test_dtype(tmp_path):
    original_t5(tmp_path / "src")
    run("t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst", "--dtype", "bfloat16")
    again = load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32))
    assert {p.dtype for p in flat_params(again).values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.fixture
def pipeline_folder(tmp_path) -> Path:
    """The golden pipeline with text encoders and tokenizers beside it."""
    src = tmp_path / "src"
    shutil.copytree(shared_path("golden/flux"), src)
    transformer = json.loads((src / "transformer" / "config.json").read_text())
    original_clip(src / "text_encoder", transformer["pooled_projection_dim"])
    original_t5(src / "text_encoder_2", dim=transformer["joint_attention_dim"])
    shutil.copytree(shared_path("assets/clip_tokenizer"), src / "tokenizer")
    shutil.copytree(shared_path("assets/t5_tokenizer"), src / "tokenizer_2")
    return src


def test_a_whole_pipeline(tmp_path, monkeypatch, pipeline_folder, capsys):
    """It finds its own tokenizers wherever it is moved to; another `tokenizer/` is not taken."""
    dst = tmp_path / "dst"
    run("flux", "--src", pipeline_folder, "--dst", dst)
    assert sorted(path.name for path in dst.iterdir()) == [
        "autoencoder",
        "pipeline.json",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
    ]
    said = capsys.readouterr().out
    for name in ("transformer", "autoencoder", "text_encoder", "text_encoder_2"):
        assert f"{dst / name}: " in said
    assert said.splitlines()[-1] == "left out: lora"

    shutil.rmtree(pipeline_folder)
    dst.rename(tmp_path / "moved")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    pipeline = FluxPipeline.from_pretrained("moved", dtype="float32")
    assert pipeline.transformer.config.guidance_embed
    assert pipeline.autoencoder.config.scaling_factor == pytest.approx(0.3611)
    assert pipeline.text_encoder.clip.config.dim == pipeline.transformer.config.pooled_dim
    assert pipeline.text_encoder.t5.config.dim == pipeline.transformer.config.txt_dim
    settings = pipeline.settings
    assert (settings.text_length, settings.steps, settings.guidance) == (512, 28, 3.5)
    prompts = ["a red circle left of a blue square", ""]
    expected = [
        load_tokenizer(str(shared_path(f"assets/{name}_tokenizer")), length)(prompts)
        for name, length in (("clip", 77), ("t5", 512))
    ]
    np.testing.assert_array_equal(pipeline.tokenizer(prompts), np.concatenate(expected, axis=1))


def test_a_bare_transformer_is_a_model_folder(tmp_path):
    src = shared_path("golden/flux/transformer")
    run("flux", "--src", src, "--dst", tmp_path / "dst")
    assert (
        load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32)).config.num_double_blocks == 2
    )


def test_what_is_not_there_is_said(tmp_path, capsys, pipeline_folder):
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        shutil.rmtree(pipeline_folder / name)
    run("flux", "--src", pipeline_folder, "--dst", tmp_path / "dst")
    said = capsys.readouterr().out
    assert "has no text_encoder_2, tokenizer_2, which prompts are read with" in said
    assert "has no vae, which pictures are made with" in said


def test_without_a_scheduler_the_published_noise_levels_are_taken(tmp_path, capsys):
    shutil.copytree(shared_path("golden/flux"), tmp_path / "src")
    shutil.rmtree(tmp_path / "src" / "scheduler")
    run("flux", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert "has no scheduler; the published noise levels are taken" in capsys.readouterr().out
    settings = json.loads((tmp_path / "dst" / "pipeline.json").read_text())
    assert settings["schedule"] == asdict(FlowSchedule())


def test_autoencoders(tmp_path):
    run("vae", "--src", shared_path("golden/flux/vae"), "--dst", tmp_path / "vae")
    tensors = open_tensors(shared_path("golden/flux/vae"))
    model = load_model(tmp_path / "vae", LoadOptions(dtype=jnp.float32))
    for key, array in in_layout(vae.TABLE, model).items():
        np.testing.assert_array_equal(array, tensors.read(key))
    run("tiny_vae", "--src", shared_path("assets/tae") / "taef1", "--dst", tmp_path / "tiny")
    assert load_model(tmp_path / "tiny", LoadOptions(dtype=jnp.float32)).config == TAEF1


def test_a_destination_with_something_in_it_is_left_alone(tmp_path, capsys):
    original_t5(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("x")
    for command in ("t5", "flux"):
        said = refused(capsys, command, "--src", tmp_path / "src", "--dst", tmp_path / "dst")
        assert f"{tmp_path / 'dst'} exists and is not empty" in said
    assert only(tmp_path / "dst", "precious")


def test_an_empty_destination_is_used(tmp_path):
    original_t5(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    run("t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert only(tmp_path / "dst", "config.json", "model.safetensors")


def test_sources_that_are_not_there_or_of_another_model(tmp_path, capsys):
    where = ("--src", tmp_path / "src", "--dst", tmp_path / "dst")
    for kind in ("t5", "clip"):
        assert "src is not there; give a .safetensors file" in refused(capsys, kind, *where)
    original_t5(tmp_path / "src")
    assert "has no field in_channels" in refused(capsys, "flux", *where)
    (tmp_path / "src" / "model.safetensors").unlink()
    assert "has no .safetensors file" in refused(capsys, "t5", *where)
    assert "should have one pair" in refused(capsys, "tiny_vae", *where)
    assert only(tmp_path, "src")


def test_wrong_keys_and_shapes_are_all_named(tmp_path, capsys):
    original_t5(tmp_path / "src")
    tensors = open_tensors(tmp_path / "src")
    arrays = {name: tensors.read(name) for name in tensors.shapes}
    arrays["surplus"] = arrays.pop("encoder.final_layer_norm.weight")
    arrays["shared.weight"] = np.zeros((12, 8), np.float32)
    write_tensors(tmp_path / "src" / "model.safetensors", arrays)
    said = refused(capsys, "t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert "1 missing: encoder.final_layer_norm.weight" in said
    assert "1 left over: surplus" in said
    assert "shared.weight is (12, 8) instead of (11, 8)" in said
    assert only(tmp_path, "src")


def test_a_truncated_part_stops_the_whole_pipeline(tmp_path, pipeline_folder, capsys):
    file = pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = refused(capsys, "flux", "--src", pipeline_folder, "--dst", tmp_path / "dst")
    assert f"{file} is truncated or damaged" in said
    assert only(tmp_path, "src")


def test_a_missing_shard(tmp_path, capsys):
    original_t5(tmp_path / "src", shards=3)
    (tmp_path / "src" / "model-00002-of-00003.safetensors").unlink()
    said = refused(capsys, "t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert "1 of the 3 shards" in said
    assert "model-00002-of-00003.safetensors" in said
    assert only(tmp_path, "src")


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    src = shared_path("golden/flux")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        said = refused(capsys, "flux", "--src", src, "--dst", tmp_path / "dst")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written (File too large)" in said
    assert only(tmp_path)
