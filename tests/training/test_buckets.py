"""Runs over pictures of several aspects: each bucket's step is compiled once."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from taca_jax.config import DataConfig, TextConfig
from taca_jax.lora import LoRAConfig, add_lora
from taca_jax.models.t5 import T5Config
from taca_jax.tokenizers import load_tokenizer
from taca_jax.training import run as run_module
from taca_jax.training import train
from taca_jax.training.inputs import open_loader
from taca_jax.training.step import TextToImage, make_trainer
from tests.random_models import random_model
from tests.training.tiny import T5, tiny_config, tiny_pipeline

SIZES = [(40, 40)] * 5 + [(60, 40)] * 4 + [(40, 60)] * 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def watched_run(pictures, out_dir, monkeypatch, **changes):
    """(the jitted step, shapes of the pictures of each step) of a finished run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(out_dir.parent / "kept"))
    steps, shapes = [], []
    real_make, real_next = run_module.make_trainer, run_module._next_batch

    def make(*arguments, **options):
        trainer, trained = real_make(*arguments, **options)
        steps.append(trainer.step)
        return trainer, trained

    def next_batch(*arguments):
        batch, names = real_next(*arguments)
        shapes.append(batch.image.shape[2:4])
        return batch, names

    monkeypatch.setattr(run_module, "make_trainer", make)
    monkeypatch.setattr(run_module, "_next_batch", next_batch)
    data = DataConfig(
        source=f"folder:{pictures}", batch_size=2, resolution=40, aspect="buckets", max_aspect=1.6
    )
    text = TextConfig("bytes", 16, T5Config(259, 32, 32, 2, 16, 1))
    train(tiny_config(out_dir, data=data, text=text, **changes))
    (step,) = steps
    return step, shapes


def check(step, shapes, steps):
    assert len(shapes) == steps
    assert set(shapes) == {(40, 40), (32, 48), (48, 32)}
    assert step._cache_size() == 3
    share = [sum(size == s for s in SIZES) for size in ((40, 40), (60, 40), (40, 60))]
    counts = Counter(shapes)
    found = [counts[shape] for shape in ((40, 40), (32, 48), (48, 32))]
    np.testing.assert_allclose(
        np.divide(found, steps), np.divide(share, len(SIZES)), atol=2 / steps
    )


@pytest.mark.slow
def test_two_hundred_steps_compile_each_bucket_once(pictures, tmp_path, monkeypatch):
    step, shapes = watched_run(pictures, tmp_path / "run", monkeypatch, steps=200, save_every=50)
    check(step, shapes, 200)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


def test_two_buckets_compile_twice(pictures, tmp_path, monkeypatch):
    """The same without the run around it, of a LoRA alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DataConfig(
        source=f"folder:{pictures}", batch_size=5, resolution=40, aspect="buckets", max_aspect=1.6
    )
    lora = {"base": "unused", "model": None, "text": TextConfig(), "lora": LoRAConfig(rank=1)}
    config = tiny_config(tmp_path, data=data, **lora)
    pipeline = tiny_pipeline()
    pipeline.tokenizer = load_tokenizer("bytes", 4)
    pipeline.text_encoder = random_model(dataclasses.replace(T5, vocab_size=259))
    add_lora(pipeline.transformer, config.lora, rngs=nnx.Rngs(0))
    model = TextToImage(pipeline.transformer, pipeline.text_encoder)
    trainer, trained = make_trainer(config, model, pipeline.autoencoder, pad_id=0)
    state, shapes = trainer.begin(trained), []
    with open_loader(config, pipeline, None) as loader:
        for _ in range(6):
            batch, _ = run_module._next_batch(loader, 1, None)
            shapes.append(batch.image.shape[2:4])
            state, metrics = trainer.run(state, batch)
    assert set(shapes) == {(40, 40), (48, 32)}  # four pictures are too few for a batch of five
    assert trainer.step._cache_size() == 2
    assert np.isfinite(metrics["loss"])
