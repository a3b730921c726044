"""`python -m convert` called from tests, and folders of originals for it to read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from taca_jax.convert.cli import main
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.text import clip_layout, t5_layout
from taca_jax.text.t5 import T5Encoder
from tests.models import CLIP, T5, in_layout
from tests.random_models import random_model

T5_SETTINGS = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 11,
    "d_model": 8,
    "d_ff": 12,
    "num_heads": 2,
    "d_kv": 4,
    "num_layers": 2,
}


def only(folder: Path, *names: str) -> bool:
    """Whether a folder holds what is named and nothing else."""
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def run(*words) -> None:
    """The command with these words, in this process."""
    main([str(word) for word in words])


def refused(capsys, *words) -> str:
    """The one line on stderr of a conversion that fails with status 1."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    capsys.readouterr()
    assert isinstance(stop.value.code, str)  # sys.exit(text): printed on stderr, status 1
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code


def said(capsys, *words) -> str:
    """What a command that succeeds prints."""
    run(*words)
    return capsys.readouterr().out


def original_t5(folder: Path, shards: int = 1, dim: int = T5.dim) -> T5Encoder:
    """A folder in transformers' layout, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(replace(T5, dim=dim))
    (folder / "config.json").write_text(json.dumps(T5_SETTINGS | {"d_model": dim}))
    tensors = in_layout(t5_layout.TABLE, model)
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors)
        return model
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        write_tensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def original_clip(folder: Path, dim: int) -> None:
    """A CLIP text encoder's folder in transformers' layout."""
    folder.mkdir()
    config = replace(CLIP, max_tokens=77, dim=dim, activation="quick_gelu", projection_dim=None)
    model = random_model(config)
    settings = {
        "model_type": "clip_text_model",
        "vocab_size": 11,
        "hidden_size": dim,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    write_tensors(folder / "model.safetensors", in_layout(clip_layout.TABLE, model))
