"""Folders of single files, as ComfyUI keeps them: the pipeline is that of the diffusers folder."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.convert.cli import main
from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.weights.loose_files import loose_files
from taca_jax.weights.original_pipelines import open_original
from taca_jax.weights.pipeline_folders import open_pipeline
from tests.pipelines.test_originals import assert_same_pipeline
from tests.weights.diffusers_folders import write_tokenizers
from tests.weights.small_flux import (
    IN_FOLDERS,
    IN_NEWER_FOLDERS,
    SIDE_BY_SIDE,
    know_the_small_clip,
    write_diffusers,
    write_file,
    write_files,
)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    know_the_small_clip(monkeypatch)


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    return write_diffusers(tmp_path_factory.mktemp("diffusers") / "flux")


def drawn(pipeline: Pipeline) -> np.ndarray:
    return pipeline(
        "a red circle", height=16, width=16, steps=1, seed=3, output="array", tiling=None
    ).images


@pytest.mark.parametrize("names", [SIDE_BY_SIDE, IN_FOLDERS, IN_NEWER_FOLDERS])
def test_the_pipeline_is_that_of_the_diffusers_folder(diffusers, tmp_path, names, caplog):
    root = write_files(tmp_path / "models", names)
    write_tokenizers(root)
    theirs = Pipeline.from_pretrained(diffusers, "float32")
    assert_same_pipeline(Pipeline.from_pretrained(root, "float32"), theirs)
    taken = ", ".join(str(root / names[part]) for part in names if part != "transformer")
    assert f"what is not within is taken from beside it: {taken}" in caplog.text
    # Of its transformer's file the same, whose folder may be ComfyUI's.
    if names is not IN_NEWER_FOLDERS:
        assert_same_pipeline(
            Pipeline.from_pretrained(root / names["transformer"], "float32"), theirs
        )


def test_it_draws_what_the_diffusers_folder_does(diffusers, tmp_path):
    root = write_files(tmp_path / "models", IN_FOLDERS)
    ours = Pipeline.from_pretrained(root, "float32", tokenizers=diffusers)
    theirs = Pipeline.from_pretrained(diffusers, "float32")
    np.testing.assert_array_equal(drawn(ours), drawn(theirs))


def test_it_converts_whole(diffusers, tmp_path, capsys):
    root = write_files(tmp_path / "models", IN_FOLDERS)
    main(["flux", "--src", str(root), "--dst", str(tmp_path / "made")])
    said = capsys.readouterr().out
    assert f"copy tokenizer, tokenizer_2 of the model's page into {tmp_path / 'made'}" in said
    main(["verify", "--src", str(root), "--dst", str(tmp_path / "made")])
    assert capsys.readouterr().out.count("equal") == 4
    shutil.rmtree(tmp_path / "made")
    flags = ["--tokenizers", str(diffusers)]
    main(["flux", "--src", str(root), "--dst", str(tmp_path / "made"), *flags])
    assert "to read prompts" not in capsys.readouterr().out
    converted = Pipeline.from_pretrained(tmp_path / "made", "float32")
    assert_same_pipeline(converted, Pipeline.from_pretrained(diffusers, "float32"))
    main(["inspect", str(root)])
    said = capsys.readouterr().out
    assert all(str(root / name) in said for name in IN_FOLDERS.values())


def test_without_tokenizers_it_is_said_where_they_are_looked_for(tmp_path):
    root = write_files(tmp_path / "models", SIDE_BY_SIDE)
    with pytest.raises(UserError, match=r"models/tokenizer is not there; it is .* tokenizers=, a"):
        Pipeline.from_pretrained(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no tokenizer nor .* black-forest-labs/FLUX"):
        Pipeline.from_pretrained(root, tokenizers=tmp_path / "empty")


def test_of_several_precisions_of_an_encoder_the_finest_is_taken(tmp_path):
    root = write_files(tmp_path, IN_FOLDERS)
    write_file(root / "clip" / "a_t5_fp8.safetensors", "text_encoder_2", jnp.float8_e4m3fn)
    found = open_original(root).models["text_encoder_2"]
    assert found.where == str(root / IN_FOLDERS["text_encoder_2"])
    write_file(root / "clip" / "copy.safetensors", "text_encoder_2")
    said = rf"several for text_encoder_2: {root}/clip/copy.*, {root}/clip/t5xxl.*; keep one"
    with pytest.raises(UserError, match=said):
        open_original(root)


def test_what_belongs_to_no_flux_is_left_out_and_what_is_damaged_is_said(tmp_path, caplog):
    root = write_files(tmp_path, SIDE_BY_SIDE)
    write_tokenizers(root)
    write_tensors(root / "lora.safetensors", {"lora_unet_x.lora_up.weight": np.zeros((2, 2))})
    (root / "broken.safetensors").write_bytes(b"12")
    assert set(open_pipeline(root).models) == {
        "transformer",
        "autoencoder",
        "text_encoder",
        "text_encoder_2",
    }
    assert "broken.safetensors is truncated or damaged" in caplog.text


def test_a_transformer_too_many_or_too_few(tmp_path):
    root = write_files(tmp_path, SIDE_BY_SIDE)
    write_file(root / "schnell.safetensors", "transformer")
    with pytest.raises(UserError, match=r"has several transformers: .*dev.*, .*schnell.*; give on"):
        open_pipeline(root)
    assert open_pipeline(root / "schnell.safetensors").models.keys() >= {"autoencoder"}
    for name in ("schnell", "flux1-dev"):
        (root / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match="is no pipeline folder: it has no pipeline"):
        open_pipeline(root)
    with pytest.raises(UserError, match=r"no transformer that is known \(FLUX\.1, Stable Diff"):
        loose_files(root).transformer()


def test_an_autoencoder_is_known_by_its_familys_name_among_several(tmp_path):
    root = write_files(tmp_path, IN_FOLDERS)
    write_file(root / "vae" / "another.safetensors", "vae")
    found = open_original(root).models["autoencoder"]
    assert found.where == str(root / "vae" / "ae.safetensors")
    (root / "vae" / "ae.safetensors").rename(root / "vae" / "third.safetensors")
    with pytest.raises(UserError, match=r"several for autoencoder: .*another.*third.*; keep one"):
        open_original(root)
