"""Meshes of devices that are not there, for what is only traced or computed from sizes."""

from jax.sharding import AbstractMesh, AxisType

from taca_jax.parallel.mesh import AXES


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """With the axes of `make_mesh`, of size 1 unless another is given."""
    types = (AxisType.Auto,) * len(AXES)
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=types)
