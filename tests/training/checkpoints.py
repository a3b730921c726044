"""What stands in a run's checkpoints, read without any of our code."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def saved_checkpoint(run_dir: Path, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, on whatever devices they were saved, and the record of a checkpoint."""
    folder = (run_dir / "checkpoints" / str(step)).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder / "state").item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(folder / "state", ocp.args.PyTreeRestore(restore_args=args))
    return arrays, json.loads((folder / "record" / "metadata").read_text())


def saved_steps(run_dir: Path) -> list[int]:
    """The steps whose checkpoints are complete, rising."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def logged(run_dir: Path) -> list[dict[str, float]]:
    """The lines of the metrics' file; one that a kill cut off is left out."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
