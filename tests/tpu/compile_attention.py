"""Compiles the attention kernel for TPU chips that are not there; prints, per case, its memory.

python -m tests.tpu.compile_attention TOPOLOGY SHAPE ...   (SHAPE: heads,head_dim,text,image)
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from taca_jax.attention import joint_attention

# How the devices of a topology share samples, heads and queries, by the number of devices.
MESHES = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2)}


def main(topology: str, *shapes: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    axes = ("data", "tensor", "context")
    mesh = Mesh(
        np.array(devices).reshape(MESHES[len(devices)]), axes, axis_types=(AxisType.Auto,) * 3
    )
    found = {}
    for shape in shapes:
        heads, head_dim, text, image = map(int, shape.split(","))
        found[shape] = compiled(mesh, heads, head_dim, text, image)
    print(json.dumps(found))


def compiled(mesh: Mesh, heads: int, head_dim: int, text: int, image: int) -> dict[str, int]:
    """The kernels in the program, and its memory: two samples, forward and all gradients."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    size = (2, text + image, heads, head_dim)
    tensor = jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=sharding)
    gamma = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)

    def run(q, k, v, gamma, d_out):
        def attend(q, k, v, gamma):
            return joint_attention(q, k, v, text_len=text, gamma=gamma)

        out, pull = jax.vjp(attend, q, k, v, gamma)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(tensor, tensor, tensor, gamma, tensor).compile()
    code = program.as_text()
    return {
        "forward_kernels": code.count("taca_attention_forward"),
        "backward_kernels": code.count("taca_attention_backward"),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
