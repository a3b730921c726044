"""Several processes as one run: joining them, and what they must agree on.

Each process of a pod has its own devices; all run the same program, and all must take part in every
computation over the mesh. In a single process all functions here are trivial.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from taca_jax.errors import UserError

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Set by hand: host:port of process 0, the number of processes, and this one's index."""

_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
"""Set by launchers: the number of processes or slices."""

_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
"""Set on GKE: the hosts of a slice, separated by commas."""


def join_processes() -> None:
    """Connects to the run's other processes, if this one was started as one of several.

    Clusters of SLURM, Open MPI, GKE and TPU VMs are recognised; any other is described by
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Must be called before JAX looks
    for devices. Raises UserError if that description is incomplete.
    """
    if jax.distributed.is_initialized():
        return
    if any(name in os.environ for name in _GIVEN):
        address, count, index = _described(os.environ)
        jax.distributed.initialize(address, count, index)
    elif _one_of_several(os.environ):
        jax.distributed.initialize()
    elif _on_tpu_vm(os.environ):
        try:
            jax.distributed.initialize()
        except ValueError as error:  # JAX's error on a single host
            if "coordinator_address" not in str(error):
                raise


def _described(environment: Mapping[str, str]) -> tuple[str, int | None, int | None]:
    """Address, count and index; the last two are None if a launcher provides them."""
    missing = [name for name in _GIVEN if not environment.get(name)]
    if missing == list(_GIVEN[1:]) and _one_of_several(environment):
        return environment[_GIVEN[0]], None, None
    if missing:
        raise UserError(f"a cluster is described by {', '.join(_GIVEN)}; set {missing[0]} too")
    address, *numbers = (environment[name] for name in _GIVEN)
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise UserError(
            f"JAX_NUM_PROCESSES is {numbers[0]} and JAX_PROCESS_ID {numbers[1]}; give numbers"
        )
    count, index = map(int, numbers)
    if not index < count:
        raise UserError(f"JAX_PROCESS_ID is {index}; of {count} processes the last is {count - 1}")
    return address, count, index


def _one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher's variables say that there are several processes; needs no network."""
    counts = [environment.get(name, "1") for name in _COUNTS]
    hosts = [environment.get(name, "") for name in _HOSTS]
    return any(count.isdigit() and int(count) > 1 for count in counts) or any(
        "," in names for names in hosts
    )


def _on_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether this host has TPU chips and may query its metadata for other hosts."""
    asked = "TPU_SKIP_MDS_QUERY" not in environment and "TPU_WORKER_HOSTNAMES" not in environment
    return asked and has_tpu_chips()


def has_tpu_chips() -> bool:
    """Whether this host seems to have TPU chips; says so of other devices under VFIO, too."""
    return any(
        each for where in ("accel[0-9]*", "vfio/[0-9]*") for each in Path("/dev").glob(where)
    )


def is_first() -> bool:
    """Whether this process is the one that writes files and prints for all."""
    return jax.process_index() == 0


def print_once(line: str, file: TextIO | None = None) -> None:
    """Prints a line, in the first process only; to stdout where no file is given."""
    if is_first():
        print(line, file=file)


def wait_for_all(what: str) -> None:
    """Waits until every process has called this with the same `what`, the name of the barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """The first process runs the block before all others, which then find the files that it made.

    `what` names the barrier.
    """
    if not is_first():
        wait_for_all(what)
    yield
    if is_first():
        wait_for_all(what)


def all_of(holds: bool) -> bool:
    """Whether `holds` is true in every process."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(holds))))


def first_says(holds: bool) -> bool:
    """Whether `holds` is true in the first process."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(holds)))


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether devices of several processes are on a mesh."""
    if mesh is None:
        return False
    return len({device.process_index for device in mesh.devices.flat}) > 1


def do_not_wait_at_exit() -> None:
    """Makes a failing process exit at once, so that the others notice and end too.

    Otherwise JAX would wait for them at exit, while they wait for it in a computation.
    """

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    if jax.process_count() > 1:
        atexit.register(leave)


def most_of_all(number: int) -> int:
    """The largest of all processes' numbers."""
    return int(np.max(multihost_utils.process_allgather(np.asarray(number))))


def names_of_all(names: Sequence[str]) -> list[str]:
    """The names of all processes, concatenated in the order of processes."""
    if jax.process_count() == 1:
        return list(names)
    text = "\n".join(names).encode()
    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.frombuffer(text.ljust(int(sizes.max())), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [
        name
        for row, size in zip(rows, sizes, strict=True)
        for name in row[: int(size)].tobytes().decode().split("\n")
    ]


def on_host(array: Any) -> np.ndarray:
    """The whole array as numpy. If other processes hold parts of it, all must call this."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
