"""Counts both kernels' static cycles per head for a TPU that is not there; prints JSON.

python -m tests.tpu.count_cycles TOPOLOGY HEADS,HEAD_DIM,TEXT,IMAGE
"""

import json
import sys

import jax

from benchmarks import tpu_static  # first: it sets what libtpu reads when it starts

# isort: split
from taca_jax.attention import joint_attention


def main(topology: str, shape: str) -> None:
    heads, head_dim, text, image = map(int, shape.split(","))
    tensor = tpu_static.struct((1, text + image, heads * head_dim))

    def attend(q, k, v, gamma):
        q, k, v = (x.reshape(1, -1, heads, head_dim) for x in (q, k, v))
        out = joint_attention(q, k, v, text_len=text, gamma=gamma, implementation="pallas")
        return out.reshape(1, -1, heads * head_dim)

    def step(q, k, v, gamma, d_out):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, gamma), q, k, v)
        return out, pull(d_out)

    gamma = tpu_static.struct((1,), "float32")
    kernels = tpu_static.measure(
        step, tensor, tensor, tensor, gamma, tensor, topology=topology, rare_branches=False
    )
    print(
        json.dumps(
            {
                direction: sum(k.cycles for k in kernels if f"attention_{direction}" in k.name)
                / heads
                for direction in ("forward", "backward")
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
