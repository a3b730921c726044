"""The LoRA in a checkpoint of a training run, read without the run's models."""

import json
import re
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from taca_jax.errors import UserError
from taca_jax.formats.lora.factors import Adapter, unstacked
from taca_jax.weights.run_folders import CHECKPOINTS

_LORA = re.compile(r"\.(trained|average)\['transformer'\](.+)\['(lora_[ab])'\]\.value")


def lora_at(run: Path, step: int, strength: float) -> Adapter:
    """The LoRA that the run had learnt by a step of which it has a checkpoint: the moving average,
    where there is one. `strength` is the run's, alpha / rank.

    Raises UserError for a checkpoint that cannot be read, or that holds no LoRA.
    """
    folder = (run / CHECKPOINTS / str(step)).absolute()
    try:
        arrays = _read(folder)
        sums = json.loads((folder / "record" / "metadata").read_text())["sums"]
    except UserError:
        raise
    except Exception as error:  # Orbax raises what its storage layers raise
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise UserError(f"{folder} cannot be read ({reason}); give another --step") from error
    if damaged := [name for name, array in arrays.items() if _sum(array) != sums.get(name)]:
        raise UserError(
            f"{folder} is damaged ({len(damaged)} arrays are not what was saved); give another "
            "--step"
        )
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        _, path, factor = _parts(name)
        found.setdefault(path, {})[factor] = array
    adapter: Adapter = {}
    for path, factors in found.items():
        a, b = factors["lora_a"], factors["lora_b"] * np.float32(strength)
        adapter = {**adapter, **unstacked(path, a, b)}
    return adapter


def _read(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the LoRA, by their names in the checkpoint."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        there = reader.metadata(folder / "state").item_metadata.tree
        of_lora = {name: each for name, each in there.items() if _LORA.fullmatch(name)}
        averaged = {name for name in of_lora if _parts(name)[0] == "average"}
        wanted = {name: of_lora[name] for name in averaged or of_lora}
        if not wanted:
            raise UserError(f"{folder} holds no LoRA")
        restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
        return reader.restore(
            folder / "state",
            ocp.args.PyTreeRestore(item=wanted, restore_args=restore, partial_restore=True),
        )


def _parts(name: str) -> tuple[str, str, str]:
    """Which state, the dotted path of the layer, and which factor an array is of."""
    match = _LORA.fullmatch(name)
    assert match is not None
    path = ".".join(part.strip("'") for part in re.findall(r"\[([^\]]+)\]", match[2]))
    return match[1], path, match[3]


def _sum(array: np.ndarray) -> int:
    """The sum of an array's words modulo 2^32, as training stores it."""
    words = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    return int(words.sum(dtype=np.uint64) % 2**32)
