"""Which devices, and which processes, hold which samples of a batch."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taca_jax.parallel.mesh import BATCH_AXES


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The sharding of arrays whose axis number `leading` is the sample axis."""
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    return NamedSharding(mesh, P(*[None] * leading, axes or None))


def put_rows(local: np.ndarray, mesh: Mesh | None, *, leading: int = 0) -> jax.Array:
    """The global array of which this process has `local`: the `local_rows` of axis `leading`."""
    if mesh is None:
        return jax.device_put(local)
    return jax.make_array_from_process_local_data(batch_sharding(mesh, leading=leading), local)


def local_rows(mesh: Mesh, samples: int) -> np.ndarray:
    """int [n], ascending: the samples of a batch that this process's devices hold."""
    held = batch_sharding(mesh).addressable_devices_indices_map((samples,))
    rows = [np.arange(samples)[index] for index in held.values()]
    return np.unique(np.concatenate(rows))


def own_rows(mesh: Mesh, samples: int) -> np.ndarray:
    """int [n], ascending: those of `local_rows` that this process owns.

    Several processes hold the same samples where mesh axes that do not split the batch span them; a
    sample's owner is the process of the first device that holds it.
    """
    indices = batch_sharding(mesh).devices_indices_map((samples,))
    owners = np.full(samples, -1)
    for device, index in indices.items():  # in the mesh's order, the same in every process
        held = owners[index]  # a view
        held[held < 0] = device.process_index
    return np.flatnonzero(owners == jax.process_index())


def samples_together(mesh: Mesh) -> int:
    """The number of groups of devices that split a batch; it must divide the batch size."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def filled_size(mesh: Mesh | None, samples: int, times: int = 1) -> int:
    """The least number, from `samples` on, of which `times` as many divide evenly over the mesh."""
    groups = 1 if mesh is None else samples_together(mesh)
    multiple = groups // math.gcd(groups, times)
    return -(-samples // multiple) * multiple
