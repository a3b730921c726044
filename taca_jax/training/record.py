"""The record of a run: its configuration in its folder, and what a resumed run may change of it."""

import sys

import jax.numpy as jnp
import numpy as np

from taca_jax.config.fields import difference
from taca_jax.config.json_text import from_json, to_json
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.processes import print_once
from taca_jax.training.checkpoints import newest_step
from taca_jax.training.config import TrainConfig

RECORD = "config.json"
"""The file's name."""

FREE_FIELDS = (
    "resume",
    "out_dir",
    "plan",
    "mesh",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "sample_height",
    "sample_width",
    "sample_steps",
    "sample_guidance",
    "evaluate",
    "data.cache",
    "data.max_bad_share",
)
"""Fields that a resumed run may change."""

LENGTH_FIELDS = ("steps", "optimizer.decay_steps")
"""Fields that it may change as long as they do not concern the steps already done."""


def write_record(config: TrainConfig) -> None:
    """Writes the configuration into the run's folder."""
    with whole_file(config.run_dir / RECORD) as record:
        record.write_text(to_json(config))


def check_record(config: TrainConfig) -> None:
    """Raises UserError unless the folder is new, or holds this run and the run is to be resumed."""
    run_dir = config.run_dir
    record = run_dir / RECORD
    if not record.is_file():
        # Allowed, so that the same command can start a run and restart it.
        if config.resume:
            print_once(f"{run_dir} holds no run yet: starting one", sys.stderr)
        return
    if not config.resume:
        raise UserError(
            f"{run_dir} holds a run already; resume=true goes on with it, out_dir=... starts "
            "another"
        )
    before = from_json(TrainConfig, record.read_text(), str(record))
    changed = [
        name
        for name in difference(before, config)
        if name not in (*FREE_FIELDS, *LENGTH_FIELDS) and name.split(".")[0] not in FREE_FIELDS
    ]
    if changed:
        raise UserError(
            f"{run_dir} was started with other values of {', '.join(changed)}; resume with the "
            "same, or start another run with out_dir=..."
        )
    done = newest_step(run_dir)
    if done > config.steps:
        raise UserError(f"{run_dir} has done {done} steps; steps={config.steps} is fewer")
    if not np.array_equal(_rates(before, done), _rates(config, done)):
        raise UserError(
            f"{run_dir} has done {done} steps at other learning rates than steps={config.steps} "
            f"and optimizer.decay_steps={config.optimizer.decay_steps} give them; resume with the "
            "same, or start another run with out_dir=..."
        )


def _rates(config: TrainConfig, done: int) -> np.ndarray:
    """The learning rates of the first `done` steps, float32 [done]."""
    return np.asarray(config.optimizer.learning_rate_at(jnp.arange(done), config.steps))
