"""Tiny scorers, which several of the tests here score with."""

import shutil
from pathlib import Path

import pytest

from taca_jax.convert.cli import main as convert
from tests.scorers import originals
from tests.shared import shared_path


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """Tiny originals, with their tokenizers."""
    tokenizer = shared_path("assets/clip_tokenizer")
    folder = tmp_path_factory.mktemp("sources")
    originals.blip().save_pretrained(folder / "blip")
    originals.bert_tokenizer(folder / "blip")
    text = originals.CLIP_TEXT | {"vocab_size": 49408, "max_position_embeddings": 77}
    originals.clip(text).save_pretrained(folder / "clip")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, folder / "clip")
    return folder


@pytest.fixture(scope="session")
def scorers(tmp_path_factory, sources) -> Path:
    folder = tmp_path_factory.mktemp("scorers")
    for command, name in {"blip_vqa": "blip", "clip_score": "clip"}.items():
        convert([command, "--src", str(sources / name), "--dst", str(folder / name)])
    return folder
