"""What a resumed run may change: its length, as long as the steps done stay what they were."""

import dataclasses
import json

import pytest

from taca_jax.config.json_text import to_json
from taca_jax.errors import UserError
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.record import RECORD, check_record
from taca_jax.training.run import train
from tests.training.tiny import tiny_config

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


@pytest.mark.parametrize(("steps", "decay"), [(10, 2), (8, 0), (6, 0), (20, 0), (9, 3), (20, 14)])
def test_a_constant_schedule_may_be_prolonged_or_brought_to_an_end(tmp_path, steps, decay):
    config = recorded(tmp_path, done=6)
    check_record(changed(config, steps=steps, decay_steps=decay))


@pytest.mark.parametrize(
    ("schedule", "change", "message"),
    [
        ({}, {"steps": 5}, "has done 6 steps; steps=5 is fewer"),
        ({}, {"steps": 10, "decay_steps": 6}, "6 steps at other learning rates than steps=10 and"),
        ({"decay_steps": 6}, {"steps": 20}, "at other learning rates than steps=20 and"),
        ({"decay_steps": 6}, {"decay_steps": 0}, "optimizer.decay_steps=0 give them; resume"),
        ({"schedule": "cosine"}, {"steps": 20}, "at other learning rates than steps=20 and"),
        ({}, {"learning_rate": 1.0}, r"other values of optimizer\.learning_rate; resume with"),
    ],
)
def test_steps_that_are_done_keep_their_learning_rates(tmp_path, schedule, change, message):
    config = recorded(tmp_path, done=6, **schedule)
    with pytest.raises(UserError, match=message) as refused:
        check_record(changed(config, **change))
    assert "\n" not in str(refused.value)


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
