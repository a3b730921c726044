"""What a resumed run may change, and what is said of the rest."""

import dataclasses
import json
import re

import pytest

from taca_jax.config.fields import fields_of
from taca_jax.config.json_text import to_json
from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.training.config import TrainConfig
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.record import MAY_CHANGE, RECORD, WHY_NOT, check_record
from taca_jax.training.run import train
from tests.training.tiny import T5, tiny_config

RATE = 3e-3


def recorded(tmp_path, *, done, **changes):
    """The configuration of a run of ten steps, `done` of which a checkpoint has."""
    optimizer = OptimizerConfig(learning_rate=RATE, **changes)
    config = tiny_config(tmp_path, steps=10, optimizer=optimizer, resume=True)
    (tmp_path / RECORD).write_text(to_json(config))
    (tmp_path / "checkpoints" / str(done)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # one that was cut short
    return config


def changed(config, *, steps=10, **optimizer):
    optimizer = dataclasses.replace(config.optimizer, **optimizer)
    return dataclasses.replace(config, steps=steps, optimizer=optimizer)


def test_a_run_goes_on_for_longer_at_the_rates_of_its_new_length(tmp_path, capsys):
    config = recorded(tmp_path, done=6)
    assert check_record(changed(config, steps=20)) == 6
    assert capsys.readouterr().out == ""
    for change, said in (
        ({"decay_steps": 5}, "rate of step 7 is 0.0024, that of a run of 10 steps; it was to be 0"),
        ({"learning_rate": 1e-4}, "rate of step 7 is 0.0001, that of a run of 10 steps"),
        ({"steps": 20, "schedule": "cosine"}, "is 0.00238, that of a run of 20 steps; it was to"),
    ):
        check_record(changed(config, **change))
        assert said in capsys.readouterr().out


def test_a_run_that_has_done_more_is_not_shortened(tmp_path):
    with pytest.raises(UserError, match="has done 6 steps; steps=5 is fewer"):
        check_record(changed(recorded(tmp_path, done=6), steps=5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optimizer": OptimizerConfig(learning_rate=RATE, b1=0.5)},
            "with optimizer.b1=0.9 (now 0.5), which cannot change: its checkpoints hold that",
        ),
        (
            {"data": DataConfig("generated:shapes/64", batch_size=4), "seed": 3},
            "data.batch_size=2 (now 4), seed=0 (now 3), which cannot change: the order of its",
        ),
        ({"text": TextConfig("bytes", 16, T5)}, "text.tokenizer=shapes (now bytes), which cannot"),
        ({"taca": TacaConfig(threshold=500)}, "taca=none (now set), which cannot change: what was"),
        ({"grad_accumulation": 2}, "what was trained so far would be another run's"),
    ],
)
def test_what_may_not_change_is_named_with_both_values(tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        check_record(dataclasses.replace(recorded(tmp_path, done=6), **change))
    assert "\n" not in str(refused.value)


def test_every_field_that_may_change_is_one():
    assert set(MAY_CHANGE) | WHY_NOT.keys() <= fields_of(TrainConfig).keys()


def test_a_prolonged_run_goes_on_and_declines(tmp_path):
    config = tiny_config(tmp_path, steps=2)
    train(config)
    longer = changed(dataclasses.replace(config, resume=True), steps=5, decay_steps=2)
    train(longer)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    rates = [line["learning_rate"] / config.optimizer.learning_rate for line in lines]
    assert rates == pytest.approx([1, 1, 1, 1, 0.5])
    assert json.loads((tmp_path / RECORD).read_text())["steps"] == 5
