"""A run's numbers and pictures in Weights & Biases (`wandb=true`), which is an extra."""

import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from taca_jax.config.json_text import to_tree
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.storage.places import in_bucket
from taca_jax.training.config import TrainConfig

ID_FILE = "wandb_id.txt"
"""In a run's folder: the id of its run there, with which it goes on when it is resumed."""

PROJECT = "taca_jax"
"""The project, unless WANDB_PROJECT names another."""


def check_wandb(config: TrainConfig) -> None:
    """Raises UserError if the package is needed and not installed."""
    if config.wandb and find_spec("wandb") is None:
        raise UserError(
            "wandb=true needs the package wandb, which is not installed: pip install -e "
            '".[wandb]", or set wandb=false'
        )


class WandbRun:
    """The run there, in the first process only; one that is resumed goes on.

    Steps are an axis of their own, so that steps which are done again after a crash are logged
    again. Everything else (project, entity, offline) is set by wandb's own environment variables.
    """

    def __init__(self, config: TrainConfig):
        """Raises UserError if wandb cannot start, as without an account."""
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        self._wandb: Any = wandb
        file = config.run_dir / ID_FILE
        ident = file.read_text().strip() if file.is_file() else secrets.token_hex(4)
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=config.name,
                id=ident,
                resume="allow",
                dir=None if in_bucket(config.run_dir) else str(config.run_dir),
                config=to_tree(config),
                allow_val_change=True,  # of what a resumed run may change
            )
        except self._wandb.Error as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"wandb cannot start ({reason}); log in with `wandb login`, set WANDB_MODE=offline "
                "in the environment, or wandb=false"
            ) from error
        with whole_file(file) as made:
            made.write_text(ident + "\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the numbers of a step."""
        self._run.log({**metrics, "step": step})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Logs a picture, uint8 HWC."""
        self._run.log({name: self._wandb.Image(picture), "step": step})

    def close(self, *, failed: bool) -> None:
        """Ends the run there, marked as failed or not; it can be gone on with in either case."""
        self._run.finish(exit_code=int(failed))
