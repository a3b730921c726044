"""Runs over pictures of several aspects: each bucket's step is compiled once. (The short form of it
is in test_caching, where there are fewer models to compile.)"""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from taca_jax.data.config import DataConfig
from taca_jax.text.config import TextConfig
from taca_jax.text.t5 import T5Config
from taca_jax.training import run as run_module
from taca_jax.training.run import train
from tests.training.tiny import tiny_config

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
