"""Models in a bucket: what of them is copied, and how they are named; pictures drawn into one."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

import generate as generate_command
from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import open_tensors
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.generate import generate
from taca_jax.pipelines.previews import open_previewer
from taca_jax.weights.bucket_files import bucket_weights
from taca_jax.weights.headers import headers_alone
from taca_jax.weights.hub_files import lora_files, model_files, pipeline_files
from taca_jax.weights.pipeline_folders import find_tokenizers, open_pipeline
from taca_jax.weights.shipped import find_weights, is_here
from tests.refusals import refusal
from tests.shared import shared_path
from tests.training.tiny import tiny_pipeline

WEIGHTS = save({"x": np.zeros(2, np.float32)})


def copied(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def test_a_pipeline_is_copied_without_what_is_beside_it(bucket, tmp_path):
    tiny_pipeline().save(tmp_path / "tiny")
    bucket.add_folder(tmp_path / "tiny", "bases/tiny")
    bucket.write("bases/tiny/transformer/pytorch_model.bin", b"another format")
    assert not is_here("gs://bucket/bases/tiny")
    stored = open_pipeline("gs://bucket/bases/tiny/")
    assert {"transformer", "text_encoder", "autoencoder"} <= {*stored.models}
    assert copied(stored.where) == copied(tmp_path / "tiny")
    assert is_here("gs://bucket/bases/tiny")
    encoder = bucket_weights("gs://bucket/bases/tiny/text_encoder", model_files)
    assert copied(encoder) == ["config.json", "model.safetensors"]
    with pytest.raises(UserError, match="gs://bucket/bases/tiny has no tokenizer"):
        find_tokenizers("gs://bucket/bases/tiny")


def test_a_file_is_copied_with_what_a_pipeline_takes_from_beside_it(bucket):
    for name in ("flux.safetensors", "ae.safetensors", "other.safetensors", "big/x.safetensors"):
        bucket.write(f"w/{name}", WEIGHTS)
    bucket.write("w/tokenizer/vocab.json", b"{}")
    found = bucket_weights("gs://bucket/w/flux.safetensors", pipeline_files)
    assert found.name == "flux.safetensors"
    assert copied(found.parent) == ["ae.safetensors", "flux.safetensors", "tokenizer/vocab.json"]


def test_a_folder_of_single_files_is_copied_whole(bucket):
    names = ["clip/a.safetensors", "top.safetensors", "unet/flux.safetensors"]
    for name in (*names, "notes/b.safetensors", "unet/x.json"):
        bucket.write(f"comfy/{name}", WEIGHTS)
    found = bucket_weights("gs://bucket/comfy", pipeline_files)
    assert copied(found) == names


def test_a_lora_is_copied_alone_and_named_among_several(bucket):
    bucket.write("runs/a/lora.safetensors", WEIGHTS)
    bucket.write("runs/a/checkpoints/1/x", b"x")
    found = find_weights("gs://bucket/runs/a/lora.safetensors", lora_files)
    assert found.read_bytes() == WEIGHTS
    assert copied(found.parent) == ["lora.safetensors"]
    bucket.write("runs/a/b.safetensors", WEIGHTS)
    bucket_weights.cache_clear()
    with pytest.raises(UserError, match=r"several weights .*; name one: gs://bucket/runs/a/FILE"):
        find_weights("gs://bucket/runs/a", lora_files)


def test_a_tiny_autoencoder_is_named_by_the_beginning_of_its_files(bucket):
    for net in ("encoder", "decoder"):
        content = shared_path(f"assets/tae/taef1_{net}.safetensors").read_bytes()
        bucket.write(f"tae/taef1_{net}.safetensors", content)
        bucket.write(f"tae/taesd3_{net}.safetensors", content)
    assert open_previewer("gs://bucket/tae/taef1").config.latent_channels == 16
    with pytest.raises(UserError, match="gs://bucket/tae/taesd is not there"):
        open_previewer("gs://bucket/tae/taesd")
    with headers_alone("gs://bucket/tae/taesd3", model_files) as path:
        assert open_previewer(path).where == path


HEADER_BYTES = 2**17


def test_only_headers_are_read(bucket, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save(tmp_path / "tiny")
    bucket.add_folder(tmp_path / "tiny", "bases/tiny")
    large = {"x": np.zeros(10 * HEADER_BYTES, np.float32)}
    large |= {f"a.name.that.is.long.{i}": np.zeros(1, np.float32) for i in range(2000)}
    bucket.write("large/model.safetensors", save(large))
    bucket.write("none/model.safetensors", b"version https://git-lfs.github.com/spec/v1\n")
    with headers_alone("gs://bucket/large", lora_files) as path:
        assert open_tensors(Path(path)).shapes == {name: x.shape for name, x in large.items()}
        assert os.stat(path).st_blocks * 512 < 10 * HEADER_BYTES
    said = "gs://bucket/none/model.safetensors is truncated or damaged"
    with pytest.raises(UserError, match=said), headers_alone("gs://bucket/none") as path:
        open_tensors(Path(path))
    with headers_alone("gs://bucket/bases/tiny") as path:
        seen = open_pipeline(path).models
        for model in seen.values():
            model.check()
    assert not is_here("gs://bucket/bases/tiny/transformer/model.safetensors")
    stored = open_pipeline("gs://bucket/bases/tiny").models
    assert {n: m.config for n, m in seen.items()} == {n: m.config for n, m in stored.items()}


def test_mistakes_are_found_before_weights_are_fetched(bucket, tmp_path, monkeypatch):
    tiny_pipeline().save(tmp_path / "tiny")
    bucket.add_folder(tmp_path / "tiny", "tiny")
    words = ["base=gs://bucket/tiny", "lora=none", f"out={tmp_path / 'x.png'}", "prompt=a dot"]
    words = ["--config", "shapes_taca", *words]
    line = refusal(monkeypatch, generate_command.main, *words, "height=42")
    assert line == "error: 42 x 40 pixels: both must be multiples of 4"
    copies = tmp_path / "copies"
    assert not [each for each in copied(copies) if each.endswith(".safetensors")]


def test_what_is_not_there_is_said(bucket):
    with pytest.raises(UserError, match="gs://bucket/none is not there: the bucket has no such"):
        find_weights("gs://bucket/none", model_files)
    with pytest.raises(UserError, match="gs://none cannot be used: there is no such bucket"):
        open_pipeline("gs://none/base")


def test_a_picture_is_drawn_into_a_bucket(bucket, tmp_path):
    tiny_pipeline().save(tmp_path / "tiny")
    bucket.add_folder(tmp_path / "tiny", "tiny")
    config = GenerateConfig(
        "gs://bucket/tiny",
        prompt="a red circle",
        taca=None,
        steps=1,
        dtype="float32",
        out="gs://bucket/pictures/a.png",
    )
    assert [str(each) for each in generate(config)] == ["gs://bucket/pictures/a.png"]
    with Image.open(io.BytesIO(bucket.read("pictures/a.png"))) as picture:
        assert "taca_jax" in picture.info
