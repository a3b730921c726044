"""Norm and rotation of queries or keys on meshes of eight virtual devices; prints errors as JSON.

Each error is that of the kernel on the mesh against plain JAX on one device: ||a - b|| / ||b|| of
the output and of the gradients of the parts and of the norms' scales.

python -m tests.nn.sharded_norm_rotate
"""

import json

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from taca_jax.nn.norm_rotate import norm_rotate
from tests.nn.test_norm_rotate import norms_of, parts_of, rotation_of

MESHES = {
    "fsdp": {"data": 1, "fsdp": 2, "other": 4},
    "context": {"context": 4, "other": 2},
    "mixed": {"data": 2, "context": 2, "tensor": 2},
}
TEXT, IMAGE, HEADS, HEAD_DIM = 16, 32, 4, 64
NORMS = norms_of(HEAD_DIM, 2)
GRAPHS, SCALES = zip(*(nnx.split(norm) for norm in NORMS), strict=True)
ROTATION = rotation_of(TEXT, IMAGE, HEAD_DIM)


def run(parts, scales, d_out, *, way):
    def call(parts, scales):
        norms = [nnx.merge(*each) for each in zip(GRAPHS, scales, strict=True)]
        return norm_rotate(parts, norms, ROTATION, implementation=way)

    out, pull = jax.vjp(call, parts, scales)
    return jax.tree.leaves([out, *pull(d_out)])


def main() -> None:
    parts = parts_of((TEXT, IMAGE), HEADS, HEAD_DIM)
    size = (len(parts[0]), TEXT + IMAGE, HEADS, HEAD_DIM)
    d_out = jax.random.normal(jax.random.key(5), size)
    whole = jax.jit(run, static_argnames="way")(parts, SCALES, d_out, way="reference")
    found = {}
    for name, axes in MESHES.items():
        sizes = tuple(axes.values())
        mesh = jax.make_mesh(sizes, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
        samples = NamedSharding(
            mesh, PartitionSpec(tuple(a for a in axes if a in ("data", "fsdp")))
        )
        placed = jax.device_put((parts, d_out), samples)
        with jax.set_mesh(mesh):
            shared = jax.jit(run, static_argnames="way")(
                placed[0], SCALES, placed[1], way="pallas_interpret"
            )
        found[name] = [
            float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))
            for a, b in zip(shared, whole, strict=True)
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
