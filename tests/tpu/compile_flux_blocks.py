"""Compiles a double and a single FLUX.1 block at full width and 1024 px, forward and backward, for
the chips of a topology, which share samples and heads. Prints JSON: how many kernels there are, and
how many copies into another layout.

python -m tests.tpu.compile_flux_blocks TOPOLOGY
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from taca_jax.families.flux.model import FLUX_DEV, FluxTransformer
from taca_jax.nn.fusion import step_options

BATCH, TEXT, SIDE = 2, 512, 128
BLOCKS = dataclasses.replace(FLUX_DEV, num_double_blocks=1, num_single_blocks=1)
MESHES = {1: (1, 1), 4: (2, 2)}


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(
        np.array(devices).reshape(MESHES[len(devices)]),
        ("data", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
    )

    def placed(shape: tuple[int, ...], dtype: jnp.dtype, spec: PartitionSpec) -> object:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    bf16, f32, samples = jnp.dtype("bfloat16"), jnp.dtype("float32"), PartitionSpec("data")
    model = nnx.eval_shape(
        lambda: FluxTransformer(BLOCKS, rngs=nnx.Rngs(0), dtype=bf16, param_dtype=bf16)
    )
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: placed(x.shape, x.dtype, PartitionSpec()), state)
    latents = placed((BATCH, SIDE, SIDE, BLOCKS.latent_channels), f32, samples)
    text = placed((BATCH, TEXT, BLOCKS.txt_dim), bf16, samples)
    pooled = placed((BATCH, BLOCKS.pooled_dim), bf16, samples)
    number = placed((BATCH,), f32, samples)

    def gradient(state, latents, timestep, text, pooled, gamma):
        def loss(latents):
            velocity = nnx.merge(graph, state)(
                latents, timestep, text, pooled, guidance=timestep, gamma=gamma
            )
            return jnp.mean(velocity**2)

        return jax.grad(loss)(latents)

    with jax.set_mesh(mesh):
        run = jax.jit(gradient, compiler_options=step_options())
        program = run.lower(state, latents, number, text, pooled, number).compile()
    length = TEXT + (SIDE // BLOCKS.patch_size) ** 2
    code = program.as_text()
    found = {
        name: len(re.findall(rf"%taca_attention_{name}[.\d]* = ", code))
        for name in ("forward", "backward")
    }
    # What would turn queries, keys or values on their way to the kernel.
    found["turned"] = len(re.findall(rf" = \S*\[\d+,{length},\S+ (?:copy|transpose)\(", code))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
