"""Compiles the longest sequences that are counted to fit into VMEM, for one TPU that is not there.

python -m tests.tpu.compile_longest TOPOLOGY HEAD_DIM

Prints the lengths as JSON: of each direction, the longest with the fastest blocks, with these and
one copy of the keys, and with any. A length that does not compile is an error.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from taca_jax.attention import joint_attention
from taca_jax.attention.pallas_tpu import Direction, NoRoomError, planned
from taca_jax.attention.pallas_tpu.blocks import default_blocks
from taca_jax.attention.pallas_tpu.target import this_chip
from taca_jax.attention.pallas_tpu.tiles import Blocks

TEXT, STEP = 512, 16
MORE_THAN_ANY = 2**20


def main(topology: str, head_dim: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    size = int(head_dim)
    found = {}
    with jax.set_mesh(mesh):
        for direction in ("forward", "backward"):
            fastest = getattr(default_blocks(this_chip(), size), direction)
            single = dataclasses.replace(fastest, key_buffers=1)
            for name, blocks in (
                ("fastest blocks", [fastest]),
                ("one copy of keys", [fastest, single]),
                ("any blocks", None),
            ):
                length = longest(direction, size, blocks)
                compile_for(mesh, direction, shape(length, size))
                found[f"{direction}, {name}"] = length
    print(json.dumps(found))


def shape(length: int, head_dim: int) -> tuple[int, int, int, int]:
    """Two columns of heads, so that each head's keys arrive while others are in use."""
    return (1, length, 2 * max(1, 128 // head_dim), head_dim)


def longest(direction: Direction, head_dim: int, blocks: list[Blocks] | None) -> int:
    """The largest multiple of STEP that fits, with one of some blocks or (None) with any."""

    def fits(length: int) -> bool:
        try:
            found = planned(
                direction,
                shape(length, head_dim),
                keys=length,
                text_len=TEXT,
                dtype=jnp.bfloat16,
            )
        except NoRoomError:
            return False
        return blocks is None or found.blocks in blocks

    low, high = 1, MORE_THAN_ANY // STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def compile_for(mesh: Mesh, direction: Direction, shape: tuple[int, int, int, int]) -> None:
    whole = NamedSharding(mesh, PartitionSpec())
    tensor = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)
    gamma = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=whole)

    def forward(q, k, v, gamma):
        return joint_attention(q, k, v, text_len=TEXT, gamma=gamma, implementation="pallas")

    def backward(q, k, v, gamma):
        return jax.grad(lambda *x: forward(*x).sum().astype(jnp.float32), (0, 1, 2, 3))(
            q, k, v, gamma
        )

    run = forward if direction == "forward" else backward
    code = jax.jit(run).lower(tensor, tensor, tensor, gamma).compile().as_text()
    assert f"taca_attention_{direction}" in code


if __name__ == "__main__":
    main(*sys.argv[1:])
