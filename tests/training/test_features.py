"""Supervised features: their loss, their part of a step, and a whole run that leaves no trace."""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from taca_jax.autoencoders.pixels import Pixels
from taca_jax.data.config import DataConfig
from taca_jax.data.shapes.labels import CLASSES, WORD_CLASSES
from taca_jax.errors import UserError
from taca_jax.families import registry
from taca_jax.families.flux.family import FLUX
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.planning import plan
from taca_jax.text.config import TextConfig
from taca_jax.training import text_lessons
from taca_jax.training.features import FeaturesConfig, Readout, readout_loss
from taca_jax.training.models import TextToImage, open_models
from taca_jax.training.run import train
from taca_jax.training.step import Batch, batch_loss, first_state, make_trainer, split_model
from tests.training.checkpoints import saved_checkpoint
from tests.training.tiny import arrays, tiny_config, tiny_pipeline

SHAPES = DataConfig("generated:shapes/64#color", batch_size=2, resolution=40)


def features(**changes) -> FeaturesConfig:
    """Read after the double block of the tiny model, whose text encoder trains with it."""
    return FeaturesConfig(**{"weight": 1.0, "blocks": 1, "text_steps": 0} | changes)


def test_the_loss_is_the_cross_entropy_of_every_label_by_what_patches_show():
    labels = np.array([[[[1, 5, 2]], [[0, 0, 4]]]], np.uint8)  # one picture of 2 x 1 patches
    logits = np.random.default_rng(0).normal(size=(1, 2, sum(CLASSES))).astype(np.float32)
    weights = (0.75, 0.25)  # the second patch shows nothing
    expected = 0.0
    for patch in range(2):
        start = 0
        for number, classes in enumerate(CLASSES):
            part = logits[0, patch, start : start + classes].astype(np.float64)
            label = labels[0, patch, 0, number]
            expected += weights[patch] * (np.log(np.exp(part).sum()) - part[label])
            start += classes
    np.testing.assert_allclose(readout_loss(jnp.array(logits), labels, 3.0), expected, rtol=1e-5)


@pytest.fixture
def model():
    pipeline = tiny_pipeline()
    readout = Readout(pipeline.transformer.config.hidden, rngs=nnx.Rngs(0))
    return TextToImage(pipeline.transformer, pipeline.text_encoder, readout)


def test_the_read_out_is_trained_beside_the_velocity(model):
    """The velocity's loss is what it is alone, and every parameter moves, the read-out's too."""
    config = tiny_config("unused", grad_accumulation=2, data=SHAPES)
    supervised = dataclasses.replace(config, features=features(weight=0.5))
    keys = jax.random.split(jax.random.key(5), 3)
    image = jax.random.randint(keys[0], (2, 2, 40, 40, 3), 0, 256).astype(jnp.uint8)
    tokens = jax.random.randint(keys[1], (2, 2, 16), 1, 33)
    labels = jax.random.randint(keys[2], (2, 2, 10, 10, 3), 0, 5).astype(jnp.uint8)
    trainer, trained = make_trainer(supervised, model, Pixels())
    start = trainer.begin(trained)
    before = {name: np.array(array) for name, array in arrays(start.trained).items()}

    rngs = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0), 2)
    parts = zip(image, tokens, rngs, strict=True)
    plain = jax.jit(partial(batch_loss, config))
    alone = [plain(start.trained, trainer.frozen, Batch(*part), rng)[0] for *part, rng in parts]
    state, first = trainer.run(start, Batch(image, tokens, labels))
    expected = sum(np.log(CLASSES))  # the read-out starts at zero
    np.testing.assert_allclose(first["features_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(first["velocity_loss"], np.mean(alone), rtol=1e-5)
    np.testing.assert_allclose(first["loss"], np.mean(alone) + 0.5 * expected, rtol=1e-5)
    state, _ = trainer.run(state, Batch(image, tokens, labels))
    after = arrays(state.trained)
    assert any("readout" in name for name in before)
    assert not [name for name in before if np.array_equal(before[name], after[name])]


@pytest.mark.parametrize("missing", ["labels", "readout"])
def test_without_labels_or_a_read_out_there_is_nothing_to_supervise(model, missing):
    config = tiny_config("unused", data=SHAPES, features=features())
    labels = None if missing == "labels" else jnp.zeros((2, 10, 10, 3), jnp.uint8)
    if missing == "readout":
        model.readout = None
    batch = Batch(jnp.zeros((2, 40, 40, 3), jnp.uint8), jnp.ones((2, 16), int), labels)
    trained, frozen = split_model(config, model, Pixels())
    with pytest.raises(ValueError, match="need a family with them, a read-out and labels"):
        jax.eval_shape(partial(batch_loss, config), trained, frozen, batch, jax.random.key(0))


def test_a_run_learns_to_name_patches_and_leaves_an_ordinary_model(tmp_path):
    config = tiny_config(tmp_path, data=SHAPES, features=features(), steps=6)
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["features_loss"] < 0.9 * lines[0]["features_loss"]
    state, _ = saved_checkpoint(tmp_path, 6)
    assert any("readout" in name for name in state)
    files = sorted((tmp_path / "model").rglob("*"))
    assert {path.name for path in files if path.is_dir()} == {
        "autoencoder",
        "text_encoder",
        "transformer",
    }
    assert not [path for path in files if path.is_file() and b"readout" in path.read_bytes()]
    FluxPipeline.from_pretrained(tmp_path / "model")  # refuses parameters that it does not know


def test_a_taught_text_encoder_stays_as_it_is(tmp_path, capsys, monkeypatch):
    """It learns the labels of words before the first step, and neither training nor resuming
    changes it."""
    monkeypatch.setattr(text_lessons, "CAPTIONS", 16)
    config = tiny_config(tmp_path, data=SHAPES, features=features(text_steps=30))
    train(config)
    said = capsys.readouterr().out
    loss = float(re.search(r"text encoder taught: a loss of ([0-9.]+) nats", said)[1])
    assert loss < 0.8 * sum(np.log(WORD_CLASSES))  # what it would say without knowing anything
    taught = load_file(tmp_path / "text_encoder" / "model.safetensors")
    state, _ = saved_checkpoint(tmp_path, 4)
    assert not [name for name in state if "text_encoder" in name]
    train(dataclasses.replace(config, resume=True, steps=6))
    assert "text encoder taught" not in capsys.readouterr().out
    kept = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    for name, array in taught.items():
        np.testing.assert_array_equal(kept[name], array.astype(kept[name].dtype))


@pytest.mark.parametrize("changes", [{"base": "somewhere", "model": None}, {"text": TextConfig()}])
def test_only_a_new_encoder_of_words_is_taught(changes):
    with pytest.raises(UserError, match=r"set features\.text_steps=0"):
        tiny_config("unused", data=SHAPES, features=features(text_steps=1), **changes)


def test_the_step_can_be_planned_without_weights():
    config = tiny_config("unused", data=SHAPES, features=features())
    models = open_models(config)
    model, autoencoder = models.abstract()
    trainer, trained = make_trainer(config, model, autoencoder)
    batch = plan._batch(models, autoencoder)
    assert batch.labels.shape == (1, 2, 10, 10, 3)
    state, metrics = jax.eval_shape(
        trainer.run, jax.eval_shape(partial(first_state, config), trained), batch
    )
    assert metrics["features_loss"].shape == ()
    assert any("readout" in jax.tree_util.keystr(path) for path, _ in leaves(state.trained))


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_a_family_without_features_is_refused_before_anything_is_loaded(monkeypatch):
    without = dataclasses.replace(FLUX, with_features=None)
    monkeypatch.setitem(registry._FAMILIES, FLUX.name, without)
    config = tiny_config("unused", data=SHAPES, features=features())
    with pytest.raises(UserError, match=r"features of FLUX\.1 cannot be supervised; set features"):
        open_models(config)
