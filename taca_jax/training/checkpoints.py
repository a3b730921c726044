"""Training checkpoints: everything that a run needs to continue as if it had never stopped."""

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.loggers import silenced
from taca_jax.nn.quantization import quantized_parts
from taca_jax.parallel.processes import all_of, is_first, wait_for_all
from taca_jax.storage.places import Place, in_bucket
from taca_jax.storage.writing import move, remove
from taca_jax.training.step import TrainState
from taca_jax.weights.run_folders import CHECKPOINTS

_OVERHEAD_BYTES = 2**20  # names, shapes and indices beside the arrays


class Checkpoints:
    """The checkpoints of one run folder, by optimizer step; a context manager.

    Each contains the training state (trained parameters, their average, optimizer, step, rng) and
    the data iterator's position. They are written asynchronously and appear atomically; a checksum
    of each array reveals later damage, which storage layers do not. `frozen` parameters are not
    stored, but their checksum and their quantisation are: to resume, both must be the same. In a
    bucket one is whole when Orbax has written `commit_success.txt` into it. If
    there are several processes, each writes and reads what its devices hold, and all must call
    every method here at the same time.
    """

    def __init__(self, run_dir: Place, *, keep: int, frozen: nnx.State):
        self._quantized = quantized_parts(frozen)
        self._frozen = sum_of(frozen)
        folder = run_dir / CHECKPOINTS
        self._dir = folder if in_bucket(folder) else folder.absolute()
        self._manager = _Manager(
            self._dir,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )
        self._failed = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._failed:
            with self._refusals():
                self._manager.close()

    def save(self, state: TrainState, data: Any) -> None:
        """Starts writing `state` and `data` (JSON) in the background.

        Raises UserError if this or the previous checkpoint cannot be written, as on a full disk.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        arrays = _as_dict(state)
        with self._refusals():
            self._manager.wait_until_finished()
        # Checked first, because on a full disk Orbax prints a traceback for each array.
        needed = sum(array.nbytes for array in arrays.values()) + _OVERHEAD_BYTES
        free = needed if in_bucket(self._dir) else shutil.disk_usage(self._dir).free
        if not all_of(free >= needed):
            raise self._refused(f"it takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
        record = {
            "data": data,
            "sums": _sums(arrays),
            "frozen": self._frozen,
            "quantized": self._quantized,
        }
        with self._refusals():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
                ),
            )

    def wait(self) -> None:
        """Waits until everything is on disk. Raises UserError if it cannot be written."""
        with self._refusals():
            self._manager.wait_until_finished()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turns any error of Orbax's writing into one UserError, without its logged tracebacks."""
        with _silent_orbax():
            try:
                yield
                return
            except Exception as error:  # Orbax raises what its storage layers raise
                reason = _reason(error)
        raise self._refused(reason)

    def _refused(self, reason: str) -> UserError:
        self._failed = True
        self._manager.reload()
        good = self._manager.latest_step()
        start = "begins again" if good is None else f"goes on from step {good}"
        return UserError(
            f"no checkpoint can be written to {self._dir} ({reason}); make room there, and "
            f"resume=true {start}"
        )

    def restore(
        self, like: TrainState, warn: Callable[[str], None]
    ) -> tuple[TrainState, Any] | None:
        """The newest readable checkpoint, in the structure of `like`, and the data's position.

        Damaged ones are reported through `warn(line)`, skipped, and moved to `damaged/` beside the
        checkpoints. None if there are no checkpoints. Raises UserError if none of them is readable,
        or if the frozen base is another one.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            arrays, record, reason = self._read(step, abstract)
            if not all_of(reason is None):
                reason = reason or "another process cannot"
            elif _sums(arrays) != record.get("sums"):
                reason = "its bits are not those that were saved"
            if reason is not None:
                warn(f"checkpoint {step} cannot be read ({reason}); trying the one before")
                continue
            if (quantized := record.get("quantized", {})) != self._quantized:
                raise UserError(
                    f"{self._dir.parent} was trained on a base with {_words(quantized)}, and this "
                    f"one has {_words(self._quantized)}; load it as it was (quantize, "
                    "quantize_text), or start another run with out_dir=..."
                )
            if record.get("frozen") != self._frozen:
                raise UserError(
                    f"the base is not the one that {self._dir.parent} was trained on so far; put "
                    "that one back, or start another run with out_dir=..."
                )
            if unread := [newer for newer in steps if newer > step]:
                self._set_aside(unread)
            return _from_dict(arrays, like), record["data"]
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self._dir} can be read for this "
                "configuration; start anew in another out_dir"
            )
        return None

    def _read(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], Any, str | None]:
        """The arrays and the record of a checkpoint, or why this process cannot read them."""
        index = jax.process_index()
        # Each process reads alone: one that failed would leave the others waiting for it.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"read{index}"
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
        )
        request = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
        )
        reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
        try:
            with _silent_orbax(), reader:
                found = reader.restore(self._dir / str(step), args=request)
            return found["state"], found["record"], None
        except Exception as error:  # Orbax raises what its storage layers raise
            return {}, {}, _reason(error)

    def _set_aside(self, steps: list[int]) -> None:
        """Moves unreadable checkpoints out of the way; they are kept, as they may be repairable."""
        if is_first():
            aside = self._dir.parent / "damaged"
            for step in steps:
                remove(aside / str(step))
                move(self._dir / str(step), aside / str(step))
        wait_for_all("checkpoints set aside")
        self._manager.reload()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own query for preemption notices, which it makes with the step's
    number; JAX's service needs the numbers that `Notice` queries it with."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def _words(quantized: dict[str, str]) -> str:
    return ", ".join(f"{part} in {to}" for part, to in quantized.items()) or "nothing quantised"


def _silent_orbax() -> AbstractContextManager[None]:
    """Keeps Orbax from logging a traceback for each array and thread affected by an error."""
    return silenced("absl", "asyncio", below=logging.CRITICAL)


def _reason(error: Exception) -> str:
    """The system's message, extracted from tensorstore's longer one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip() or repr(error)
    said = re.search(r"([^:\[\]]+) \[os_error_code=", text)
    return said[1].strip() if said else text.splitlines()[0][:200]


def newest_step(run_dir: Place) -> int:
    """The step of a run's newest checkpoint, by names alone; 0 without any."""
    folder = run_dir / CHECKPOINTS
    if in_bucket(folder):  # where a folder is there before it is whole
        found = [marker.parent for marker in folder.glob("*/commit_success.txt")]
    else:
        found = list(folder.glob("*"))
    return max((int(each.name) for each in found if each.name.isdigit()), default=0)


def sum_of(parameters: nnx.State) -> int:
    """A checksum of a model's parameters."""
    return sum(_sums(_as_dict(parameters)).values())


def _sums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """The sum of each array's words modulo 2^32, which does not depend on its sharding."""
    return {name: int(total) for name, total in jax.device_get(_add_words(arrays)).items()}


@jax.jit
def _add_words(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def add(array: jax.Array) -> jax.Array:
        if array.dtype == jnp.uint4:  # bitcasts take 4-bit numbers only in pairs
            array = array.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
        return jnp.sum(words, dtype=jnp.uint32)

    return jax.tree.map(add, arrays)


def _as_dict(state: Any) -> dict[str, Any]:
    """The state's leaves by path, so that files do not depend on our classes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def _from_dict(leaves: dict[str, Any], like: TrainState) -> TrainState:
    flat, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [leaves[jax.tree_util.keystr(path)] for path, _ in flat])
