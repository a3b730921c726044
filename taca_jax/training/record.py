"""The record of a run: its configuration in its folder, and what a resumed run may change of it."""

import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from taca_jax.config.fields import difference, show
from taca_jax.config.json_text import from_json, to_json
from taca_jax.config.presets import RECORD
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.processes import print_once
from taca_jax.training.config import TrainConfig

MAY_CHANGE = (
    # How far it goes, and at which learning rates from here on.
    "steps",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "optimizer.cycles",
    "optimizer.decay_steps",
    "optimizer.clip_norm",
    # What it tells and keeps.
    "log_every",
    "wandb",
    "save_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "sample_height",
    "sample_width",
    "sample_steps",
    "sample_guidance",
    "validation.every",
    "evaluate",
    # Where it runs, and where things are.
    "resume",
    "out_dir",
    "name",
    "plan",
    "mesh",
    "attention",
    "remat",
    "base",  # whose parameters the checkpoints know by their checksum
    "tokenizers",
    "data.cache",
    "data.max_bad_share",
    # What it started from is in its checkpoints.
    "lora.init",
)
"""Fields, or whole groups of them, that a resumed run may change."""

WHY_NOT = {
    "lora": "its checkpoints hold factors of those shapes and strengths",
    "optimizer": "its checkpoints hold that optimizer's moments",
    "data.encode": "its checkpoints tell by their checksum which models were in memory",
    "data": "the order of its examples would be another one, and its place in that order unknown",
    "validation": "which pictures are held out decides the order of all others",
    "seed": "the noise and the order of what was done so far would be another run's",
    "taca": "what was trained so far is for that TACA",
    "quantize": "what was trained so far is for a base in those bits",
}
"""Why other fields may not change, by the beginnings of their names, the first that fits; WHY_ELSE
of all others."""

WHY_ELSE = "what was trained so far would be another run's"


def write_record(config: TrainConfig) -> None:
    """Writes the configuration into the run's folder."""
    with whole_file(config.run_dir / RECORD) as record:
        record.write_text(to_json(config))


def check_record(config: TrainConfig) -> int:
    """How many steps the run has done that is to be resumed; 0 for a new one.

    Raises UserError unless the folder is new, or holds this run and the run is to be resumed.
    """
    run_dir = config.run_dir
    record = run_dir / RECORD
    if not record.is_file():
        # Allowed, so that the same command can start a run and restart it.
        if config.resume:
            print_once(f"{run_dir} holds no run yet: starting one", sys.stderr)
        return 0
    if not config.resume:
        raise UserError(
            f"{run_dir} holds a run already; resume=true goes on with it, out_dir=... starts "
            "another"
        )
    before = from_json(TrainConfig, record.read_text(), str(record))
    changed = difference(before, config)
    if refused := {name: pair for name, pair in changed.items() if not _may_change(name)}:
        raise UserError(_refusal(config, refused))
    from taca_jax.training.checkpoints import newest_step  # slow to import, and needed only here

    done = newest_step(run_dir)
    if done > config.steps:
        raise UserError(f"{run_dir} has done {done} steps; steps={config.steps} is fewer")
    _say_rates(before, config, done)
    return done


def _may_change(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)


def _refusal(config: TrainConfig, changed: Mapping[str, tuple[Any, Any]]) -> str:
    """What cannot be changed, with the values before and now, why, and what to do."""
    each = ", ".join(
        f"{name}={_shown(was)} (now {_shown(now)})" for name, (was, now) in changed.items()
    )
    first = next(iter(changed))
    fits = (why for begin, why in WHY_NOT.items() if f"{first}.".startswith(f"{begin}."))
    start = "" if config.lora is None else " and lora.init=FILE, the LoRA that it has made so far"
    return (
        f"{config.run_dir} was started with {each}, which cannot change: {next(fits, WHY_ELSE)}. "
        f"Resume with the same, or start another run with out_dir=...{start}"
    )


def _shown(value: Any) -> str:
    """A field's value; of a group that is none on the other side, only that it is there."""
    return "set" if hasattr(value, "__dataclass_fields__") else show(value) or "empty"


def _say_rates(before: TrainConfig, config: TrainConfig, done: int) -> None:
    """Says so if the learning rate goes on at another value than the run would have had."""
    if not done or done == config.steps:
        return
    was, now = (
        float(each.optimizer.learning_rate_at(jnp.int32(done), each.steps))
        for each in (before, config)
    )
    if was != now:
        print_once(
            f"the learning rate of step {done + 1} is {now:.3g}, that of a run of "
            f"{config.steps} steps; it was to be {was:.3g}"
        )
