"""Training checkpoints: all that a run needs to go on as if it had never stopped."""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from taca_jax.errors import UserError
from taca_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run folder, by optimizer step; a context manager.

    Each holds the training state (trained parameters, their average, optimizer, step, rng) and the
    data iterator's position. They are written beside the run and appear whole or not at all.
    """

    def __init__(self, run_dir: Path, *, keep: int):
        self._dir = (run_dir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self._dir,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: Any) -> None:
        """Starts writing `state` and `data` (JSON) and returns; training goes on meanwhile."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)), data=ocp.args.JsonSave(data)
            ),
        )

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong (OSError for a full disk)."""
        self._manager.wait_until_finished()

    def restore(self, like: TrainState, warn) -> tuple[TrainState, Any] | None:
        """The newest checkpoint that reads back, in the shape of `like`, and the data's position.

        A damaged one is reported through `warn(line)` and passed over. None where there is none.
        Raises UserError when there are some and none fits.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
                    ),
                )
            except Exception as error:  # Orbax raises whatever its storage layers raise
                reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
                warn(f"checkpoint {step} cannot be read ({reason}); trying the one before")
                continue
            for newer in [s for s in steps if s > step]:
                shutil.rmtree(self._dir / str(newer), ignore_errors=True)
            self._manager.reload()
            return _from_dict(restored["state"], like), restored["data"]
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self._dir} can be read for this configuration; "
                "start anew in another out_dir"
            )
        return None


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The state's leaves under plain path names, so that files do not depend on our classes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def _from_dict(leaves: dict[str, Any], like: TrainState) -> TrainState:
    flat, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [leaves[jax.tree_util.keystr(path)] for path, _ in flat])
