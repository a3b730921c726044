"""A gamma(t) that is learnt: it begins as configured, has its gradient, and is written and read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.autoencoders.pixels import Pixels
from taca_jax.config.json_text import from_json
from taca_jax.errors import UserError
from taca_jax.nn.lora import LoRAConfig
from taca_jax.taca import TacaConfig, gamma_at
from taca_jax.text.config import TextConfig
from taca_jax.training.learned_gamma import LearnedGamma
from taca_jax.training.models import TextToImage
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.run import train
from taca_jax.training.step import Batch, batch_loss, split_model
from tests.training.tiny import arrays, tiny_config, tiny_pipeline

TACA = TacaConfig(gamma=1.5, threshold=600, schedule="linear")


def adapting(out_dir, **changes):
    values = {
        "base": "a base",
        "model": None,
        "text": TextConfig(),
        "taca": TACA,
        "gamma_knots": 3,
        "optimizer": OptimizerConfig(learning_rate=1e-2),
    }
    return tiny_config(out_dir, **(values | changes))


def test_it_begins_as_configured():
    gamma = LearnedGamma(TACA, 5)
    times = jnp.linspace(600, 1000, 9)
    np.testing.assert_allclose(gamma(times), gamma_at(TACA, times), rtol=1e-6)
    learned = gamma.learned()
    assert learned.knots == (1.0, 1.125, 1.25, 1.375, 1.5)
    np.testing.assert_allclose(gamma_at(learned, times), gamma_at(TACA, times), rtol=1e-6)


def test_the_loss_without_it_is_the_same_and_its_gradient_is_the_slope_of_the_loss():
    pipeline = tiny_pipeline()
    model = TextToImage(pipeline.transformer, pipeline.text_encoder, gamma=LearnedGamma(TACA, 3))
    config = adapting("unused")
    trained, frozen = split_model(config, model, Pixels())
    (name,) = arrays(trained)
    assert "log_gamma" in name
    keys = jax.random.split(jax.random.key(5), 3)
    batch = Batch(
        jax.random.randint(keys[0], (4, 40, 40, 3), 0, 256).astype(jnp.uint8),
        jax.random.randint(keys[1], (4, 16), 1, 33),
    )

    @jax.jit
    def loss(trained):
        return batch_loss(config, trained, frozen, batch, keys[2])[0]

    plain = TextToImage(pipeline.transformer, pipeline.text_encoder)
    given, rest = split_model(dataclasses.replace(config, gamma_knots=None), plain, Pixels())
    expected, _ = batch_loss(
        dataclasses.replace(config, gamma_knots=None), given, rest, batch, keys[2]
    )
    np.testing.assert_allclose(loss(trained), expected, rtol=1e-6)
    (gradient,) = jax.tree.leaves(jax.grad(loss)(trained))
    assert np.abs(gradient).min() > 0  # times are drawn between all of the knots
    direction, size = np.float32([1, -2, 3]), 3e-3
    ahead, behind = (
        loss(jax.tree.map(lambda x, s=sign: x + s * size * direction, trained)) for sign in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * size), gradient @ direction, rtol=2e-2)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=4)])
def test_a_run_learns_it_and_leaves_the_base_alone(tmp_path, capsys, lora):
    tiny_pipeline().save(tmp_path / "base")
    config = adapting(
        tmp_path / "run", base=str(tmp_path / "base"), lora=lora, steps=3, save_every=3
    )
    train(config)
    learned = from_json(TacaConfig, (config.run_dir / "taca.json").read_text())
    assert learned.threshold == 600
    assert learned.knots is not None
    start = LearnedGamma(TACA, 3).learned().knots
    assert max(abs(a - b) for a, b in zip(learned.knots, start, strict=True)) > 0.1
    words = ",".join(f"{knot:g}" for knot in learned.knots)
    assert f"draw with taca.threshold=600 taca.knots={words}" in capsys.readouterr().out
    lines = [json.loads(x) for x in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(0.5 < line["gamma"] < 2 for line in lines)
    assert (config.run_dir / "lora.safetensors").exists() == (lora is not None)
    assert not (config.run_dir / "model").exists()


def test_what_it_cannot_begin_with_is_refused():
    with pytest.raises(UserError, match="gamma_knots begin as taca says, and taca is none"):
        adapting("unused", taca=None)
    with pytest.raises(UserError, match="gamma_knots is 1; it must be 2 or more"):
        adapting("unused", gamma_knots=1)
    with pytest.raises(
        UserError, match="gamma_knots adapt a trained model; give base=FOLDER, or gamma_knots"
    ):
        tiny_config("unused", taca=TACA, gamma_knots=3)
