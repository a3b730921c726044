"""Samples while training: what stands side by side, at which steps and sizes, also from a cache."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.pipelines import batching, grids
from taca_jax.sampling import loop
from taca_jax.training import samples as samples_module
from taca_jax.training.models import RunModels
from taca_jax.training.run import train
from tests.training.tiny import lora_changes, tiny_config, tiny_pipeline

PROMPTS = ("a red circle", "three cyan triangles", "a blue square")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_pipeline().save(folder)
    return str(folder)


def config_for(base, out_dir, **changes):
    usual = {"sample_every": 2, "sample_prompts": PROMPTS, "sample_steps": 2}
    return tiny_config(out_dir, **(lora_changes(base) | usual | changes))


@pytest.fixture
def drawn(monkeypatch):
    """(pictures, captions, headings) of each grid, as arrays."""
    seen = []
    real = grids.caption_grid

    def grid(pictures, captions, *, columns, headings):
        seen.append(([np.asarray(each, float) for each in pictures], captions, headings))
        return real(pictures, captions, columns=columns, headings=headings)

    monkeypatch.setattr(samples_module, "caption_grid", grid)
    return seen


def distance(one, other):
    return np.abs(one - other).max()


def test_plain_and_trained_stand_side_by_side_also_before_the_first_step(
    base, tmp_path, drawn, capsys
):
    before = loop._compiled()._cache_size()
    train(config_for(base, tmp_path))
    assert loop._compiled()._cache_size() == before + 1  # one program for all columns and steps
    files = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert files == ["0000000.png", "0000002.png", "0000004.png"]
    said = capsys.readouterr().err
    assert "drawing samples ..." in said
    assert f"samples before the first step: {tmp_path / 'samples' / files[0]}" in said
    assert f"samples after step 4: {tmp_path / 'samples' / files[2]}" in said
    with Image.open(tmp_path / "samples" / files[0]) as grid:
        assert grid.width > 3 * 520
    for pictures, captions, headings in drawn:
        assert headings == ["plain", "TACA, gamma 1.2", "TACA + LoRA"]
        assert captions == [prompt for prompt in PROMPTS for _ in headings]
        assert distance(pictures[0], pictures[1]) > 0
        assert len(pictures) == 9
    (first, *_), (later, *_) = drawn[0], drawn[-1]
    for row in (0, 3, 6):
        assert distance(first[row + 1], first[row + 2]) == 0  # a LoRA begins as nothing
        assert distance(later[row + 1], later[row + 2]) > 0
        assert distance(later[row], first[row]) == distance(later[row + 1], first[row + 1]) == 0


def test_a_style_is_drawn_beside_the_plain_base(base, tmp_path, drawn):
    train(config_for(base, tmp_path, taca=None, steps=2))
    for _, _, headings in drawn:
        assert headings == ["plain", "LoRA"]
    first, later = (pictures for pictures, _, _ in drawn)
    assert distance(first[0], first[1]) == 0
    assert distance(later[0], later[1]) > 0


def test_samples_have_their_own_size_and_come_in_batches(base, tmp_path, drawn, monkeypatch):
    tall = {"sample_height": 48, "sample_width": 32, "steps": 1, "sample_every": 1}
    train(config_for(base, tmp_path / "together", **tall))
    monkeypatch.setattr(batching, "TOKENS_TOGETHER", 2 * 12 * 8)
    train(config_for(base, tmp_path / "batches", **tall))
    together, _, batches, _ = (pictures for pictures, _, _ in drawn)
    assert together[0].shape == (48, 32, 3)
    assert len(batches) == 9
    assert max(map(distance, together, batches)) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_width": 42}, "sample_width is 42; this model draws multiples of 4 pixels"),
        ({"sample_guidance": -1.0}, "guidance is -1.0; it must be 0 or more"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_before_anything_loads(
    base, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(RunModels, "load_inputs", None)
    with pytest.raises(UserError, match=message):
        train(config_for(base, tmp_path, **changes))


def cached(config, cache):
    data = DataConfig(
        "generated:shapes/8", batch_size=2, resolution=40, encode="cache", cache=str(cache)
    )
    return dataclasses.replace(config, data=data, steps=1, sample_every=1, sample_guidance=2.0)


def test_samples_from_a_cache_are_those_of_training_online(
    base, tmp_path, drawn, monkeypatch, capsys
):
    config = cached(config_for(base, tmp_path / "first"), tmp_path / "cache")
    train(config)
    online = dataclasses.replace(config.data, encode="online", cache=None)
    train(dataclasses.replace(config, data=online, out_dir=str(tmp_path / "online")))
    (stored, *_), (expected, *_) = drawn[0], drawn[2]
    assert max(map(distance, stored, expected)) <= 1
    assert "other sample_prompts" not in capsys.readouterr().out

    other = dataclasses.replace(
        config, sample_prompts=(*PROMPTS[:1], "a green cross"), out_dir=str(tmp_path / "other")
    )
    train(other)
    said = f"{tmp_path / 'cache'} was made for other sample_prompts: encoded and added a green"
    assert said in capsys.readouterr().out
    # Both sets of prompts are in the cache now, and no text encoder is read for them.
    monkeypatch.setattr(RunModels, "load_inputs", None)
    for again in (config, other):
        train(dataclasses.replace(again, out_dir=str(tmp_path / "again" / again.run_dir.name)))
    assert distance(drawn[-1][0][0], drawn[0][0][0]) == 0


def test_prompts_that_no_tokenizer_reads_fail_before_the_cache_is_made(base, tmp_path):
    config = cached(config_for(base, tmp_path / "run", sample_prompts=("a dog",)), tmp_path / "c")
    with pytest.raises(UserError, match="the word 'dog' is unknown to this model"):
        train(config)
    assert not (tmp_path / "c").exists()
