"""`python -m convert clip_score` and `blip_vqa`: what they refuse, and the tokenizers they take."""

import json

import numpy as np

from taca_jax.formats.tensor_files import write_tensors
from taca_jax.scorers import blip_layout
from taca_jax.scorers.blip import BLIPConfig
from taca_jax.scorers.vit import ViTConfig
from tests.convert.commands import only, refused, run, said
from tests.models import in_layout
from tests.random_models import random_model

BLIP = BLIPConfig(
    image=ViTConfig(
        image_size=16,
        patch_size=8,
        dim=64,
        ff_dim=8,
        num_heads=1,
        num_layers=2,
        activation="gelu",
        norm_epsilon=1e-6,
        pre_norm=False,
    ),
    vocab_size=11,
    max_tokens=7,
    ff_dim=12,
    num_heads=1,
    num_layers=2,
    answer_token=9,
    question_token=10,
)


def test_a_file_in_the_authors_layout_with_its_tokenizer(tmp_path, capsys):
    model = random_model(BLIP)
    write_tensors(tmp_path / "blip.safetensors", in_layout(blip_layout.ORIGINAL_TABLE, model))
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    where = ("--src", tmp_path / "blip.safetensors", "--dst", tmp_path / "dst")
    run("blip_vqa", *where)
    assert only(tmp_path / "dst", "config.json", "model.safetensors", "tokenizer")
    assert only(tmp_path / "dst" / "tokenizer", "vocab.txt")
    assert "0 rounded to float32" in said(capsys, "verify", *where)
    assert "a model folder of kind blip_vqa" in said(capsys, "inspect", tmp_path / "dst")
    assert "exists and is not empty" in refused(capsys, "blip_vqa", *where)


def test_other_models_are_refused_and_leave_nothing(tmp_path, capsys):
    write_tensors(tmp_path / "other.safetensors", {"x": np.zeros(3, np.float32)})
    file = ("--src", tmp_path / "other.safetensors", "--dst", tmp_path / "dst")
    assert "is no BLIP for questions in its authors' names" in refused(capsys, "blip_vqa", *file)
    assert "config.json is not there" in refused(capsys, "clip_score", *file)
    folder = tmp_path / "src"
    folder.mkdir()
    (tmp_path / "other.safetensors").rename(folder / "model.safetensors")
    where = ("--src", folder, "--dst", tmp_path / "dst")
    settings = {"model_type": "bert", "text_config": {}, "vision_config": {}}
    for command, kind in {"blip_vqa": "blip", "clip_score": "clip"}.items():
        (folder / "config.json").write_text(json.dumps(settings))
        assert f"says model_type 'bert'; only '{kind}'" in refused(capsys, command, *where)
    changes = {"text_config": {"hidden_size": 64}, "model_type": "blip"}
    (folder / "config.json").write_text(json.dumps(settings | changes))
    assert "says hidden_size 64; only 768 is supported" in refused(capsys, "blip_vqa", *where)
    assert only(tmp_path, "src")
