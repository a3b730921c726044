"""The folder of a training run: its configuration and the steps that it has checkpoints of."""

import json
from pathlib import Path
from typing import Any

from taca_jax.config.presets import RECORD
from taca_jax.errors import UserError

CHECKPOINTS = "checkpoints"
"""In a run's folder: its checkpoints, each in a folder named by its step."""


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a training run."""
    return (folder / CHECKPOINTS).is_dir() and (folder / RECORD).is_file()


def settings_of_run(run: Path) -> dict[str, Any]:
    """The run's configuration, as JSON has it. Raises UserError if it cannot be read."""
    try:
        return json.loads((run / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run / RECORD} cannot be read ({error})") from error


def steps_of_run(run: Path) -> list[int]:
    """The steps that the run has checkpoints of, rising."""
    return sorted(int(each.name) for each in (run / CHECKPOINTS).iterdir() if each.name.isdigit())
