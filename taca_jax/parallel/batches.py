"""Which samples of a batch lie on which devices, and in which process."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taca_jax.parallel.mesh import BATCH_AXES


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Of arrays whose axis `leading` is that of the samples."""
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    return NamedSharding(mesh, P(*[None] * leading, axes or None))


def put_rows(local: np.ndarray, mesh: Mesh | None, *, leading: int = 0) -> jax.Array:
    """This process's rows, `local_rows` of axis `leading`, as a part of the array of all."""
    if mesh is None:
        return jax.device_put(local)
    return jax.make_array_from_process_local_data(batch_sharding(mesh, leading=leading), local)


def local_rows(mesh: Mesh, samples: int) -> np.ndarray:
    """int [n], rising: which of a batch's samples this process's devices hold."""
    places = batch_sharding(mesh).addressable_devices_indices_map((samples,))
    rows = [np.arange(samples)[index] for index in places.values()]
    return np.unique(np.concatenate(rows))


def own_rows(mesh: Mesh, samples: int) -> np.ndarray:
    """int [n], rising: those of `local_rows` that this process alone answers for, the one whose
    device is the first of a sample's. Axes that do not divide a batch may lie over processes, which
    then hold the same samples."""
    places = batch_sharding(mesh).devices_indices_map((samples,))
    owners = np.full(samples, -1)
    for device, index in places.items():  # in the mesh's order, the same in every process
        held = owners[index]  # a view
        held[held < 0] = device.process_index
    return np.flatnonzero(owners == jax.process_index())


def samples_together(mesh: Mesh) -> int:
    """A batch must be a multiple of this many samples."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
