"""The loss on held-out pictures: what it is, that it stays comparable, and where it is written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.taca import TacaConfig
from taca_jax.training import validation as module
from taca_jax.training.config import ValidationConfig
from taca_jax.training.inputs import open_examples, open_loader, open_validation
from taca_jax.training.losses import flow_matching_loss, interpolate
from taca_jax.training.models import TextToImage, open_models
from taca_jax.training.run import train
from taca_jax.training.signals import Notice
from taca_jax.training.step import make_trainer
from taca_jax.training.validation import LOSS, Validation, validation_times
from tests.training.tiny import lora_changes, tiny_config, tiny_pipeline

PICTURES = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_pipeline().save(folder)
    return str(folder)


def config_for(base, out_dir, *, batch_size=2, encode="online", **changes):
    usual = {
        "data": DataConfig("generated:shapes/8", batch_size=batch_size, encode=encode),
        "validation": ValidationConfig(every=2, pictures=PICTURES, timesteps=2),
    }
    return tiny_config(out_dir, **(lora_changes(base) | usual | changes))


def measured(config):
    models = open_models(config)
    inputs = models.load_inputs()
    model = TextToImage(models.load_transformer(), inputs.text_encoder)
    trainer, trained = make_trainer(config, model, inputs.autoencoder)
    training, held_out = open_examples(models, inputs)
    examples = held_out or open_validation(models, inputs, Notice(""))
    return Validation(models, inputs, examples).loss(trainer, trained), models, training, examples


def test_it_is_the_loss_of_training_at_fixed_noise_and_times(base, tmp_path):
    config = config_for(base, tmp_path, taca=TacaConfig(threshold=400))
    loss, models, training, held_out = measured(config)
    inputs, transformer = models.load_inputs(), models.load_transformer()
    assert validation_times(config).tolist() == [550, 850]
    (bucket,) = held_out.buckets
    expected = []
    for index in np.concatenate(bucket.parts).tolist():
        example = held_out.source[index]
        x0 = inputs.autoencoder.encode(example["image"][None].astype(np.float32) / 127.5 - 1)
        text = inputs.text_encoder(inputs.tokenizer([example["caption"]]))
        key = jax.random.fold_in(jax.random.key(module._NOISE_SEED), index)
        noise = jax.random.normal(key, x0.shape[1:])[None]
        for time in (550.0, 850.0):
            timestep = jnp.full(1, time)
            velocity = transformer(
                interpolate(x0, noise, timestep),
                timestep,
                text.txt,
                text.pooled,
                gamma=jnp.full(1, 1.2),
                lora_scale=jnp.ones(1),
            )
            expected.append(float(flow_matching_loss(velocity, x0, noise)))
    assert len(expected) == 2 * PICTURES
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    # Another seed and another batch size measure the same; training gives none of these pictures.
    data = dataclasses.replace(config.data, batch_size=4, seed=5)
    again, *_ = measured(dataclasses.replace(config, seed=7, data=data))
    assert again == pytest.approx(loss, rel=1e-5)
    names = {held_out.source[index]["id"] for index in np.concatenate(bucket.parts).tolist()}
    with open_loader(models, inputs, training) as loader:
        given = {name for _ in range(10) for name in next(loader)["id"]}
    assert len(given) == 8 - PICTURES
    assert not given & names


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_it_stands_beside_the_loss_also_before_the_first_step(base, tmp_path, capsys):
    config = config_for(base, tmp_path / "online", steps=3)
    train(config)
    found = {line["step"]: line.get(LOSS) for line in lines(config.run_dir)}
    assert [step for step, loss in found.items() if loss is not None] == [0, 2, 3]
    assert found[0] != found[2] != found[3]
    assert list(found) == [0, 1, 2, 3]
    assert f"validation loss {found[2]:.4f} after step 2" in capsys.readouterr().err
    # From a cache it is the same, with a source of its own too, which has a cache of its own.
    own = ValidationConfig(every=9, pictures=PICTURES, timesteps=2, source=config.data.source)
    for name, validation in (("cache", config.validation), ("own", own)):
        cached = dataclasses.replace(
            config_for(base, tmp_path / name, encode="cache", steps=1), validation=validation
        )
        train(cached)
        first, last = lines(cached.run_dir)
        assert first[LOSS] == pytest.approx(found[0], rel=1e-5)
        assert last[LOSS] != first[LOSS]
    assert (tmp_path / "own" / "cache-validation" / "manifest.json").is_file()
    # A run that goes on keeps what was measured, and measures no base again.
    train(dataclasses.replace(config, resume=True, steps=4))
    again = {line["step"]: line.get(LOSS) for line in lines(config.run_dir)}
    assert list(again) == [0, 1, 2, 3, 4]
    assert {step: again[step] for step in found} == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": 0}, "validation.every is 0; it must be 1 or more"),
        ({"pictures": 0}, "validation.pictures is 0; it must be 1 or more"),
        ({"source": "nowhere"}, "validation.source is nowhere; it must be folder:PATH"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        ValidationConfig(**values)
