"""Joint attention and its gradients on meshes of eight virtual devices; prints errors as JSON.

Each error is against the same call on one device: ||a - b|| / ||b|| of the output and of the
gradients of q, k, v and gamma. "chunks" is what a TPU without room for the kernel takes instead,
and "sums" are the output and the log-sum-exps of its softmax, on the mesh that shares everything.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from taca_jax.attention import chunked, joint_attention, joint_attention_with_log_sums
from taca_jax.attention.sharded import over_mesh

MESHES = {
    "data": {"data": 8},
    "data and fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"tensor": 4, "other": 2},
    "context": {"context": 8},
    "mixed": {"data": 2, "tensor": 2, "context": 2},
}
BATCH, TEXT, IMAGE, HEADS, HEAD_DIM = 8, 13, 30, 4, 32  # 43 tokens divide over nothing


KERNEL = partial(joint_attention, implementation="pallas_interpret")
CHUNKS = over_mesh(chunked.joint_attention, whole_sequences=True)


def run(q, k, v, gamma, d_out, *, attention=KERNEL):
    def attend(q, k, v, gamma):
        return attention(q, k, v, text_len=TEXT, gamma=gamma)

    out, pull = jax.vjp(attend, q, k, v, gamma)
    return [out, *pull(d_out)]


def sums(q, k, v, gamma, d_out):
    del d_out
    out, sums = joint_attention_with_log_sums(
        q, k, v, text_len=TEXT, gamma=gamma, implementation="pallas_interpret"
    )
    return [out, *sums]


def errors(parts, whole) -> list[float]:
    return [
        float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))
        for a, b in zip(parts, whole, strict=True)
    ]


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    size = (BATCH, TEXT + IMAGE, HEADS, HEAD_DIM)
    q, k, v, d_out = (jax.random.normal(key, size) for key in keys)
    inputs = (q, k, v, jnp.linspace(1.0, 2.0, BATCH), d_out)
    whole = jax.jit(run)(*inputs)
    found = {}
    for name, axes in MESHES.items():
        mesh = jax.make_mesh(
            tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
        )
        batch = tuple(axis for axis in axes if axis in ("data", "fsdp")) or None
        placed = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(batch)))
        with jax.set_mesh(mesh):
            found[name] = errors(jax.jit(run)(*placed), whole)
            if name == "mixed":
                chunks = jax.jit(partial(run, attention=CHUNKS))
                found["chunks"] = errors(chunks(*placed), whole)
                sums_of_parts = jax.jit(sums)(*placed)
    found["sums"] = errors(sums_of_parts, jax.jit(sums)(*inputs))
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        try:
            jax.jit(run)(*inputs)
        except ValueError as error:
            found["refused"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
