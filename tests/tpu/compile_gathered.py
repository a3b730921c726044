"""Compiles a double and a single FLUX.1 block at full width, with LoRA factors and their gradients,
for four v6e chips that share parameters. Prints JSON: how many loops the program has, how many
collective-permutes and all-gathers, and what shares of the gathered bytes move asynchronously and
of the time on the wires is hidden.

python -m tests.tpu.compile_gathered
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import FLUX_DEV
from taca_jax.nn.fusion import step_options
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.parallel.batches import batch_sharding
from taca_jax.parallel.chips import CHIPS
from taca_jax.parallel.mesh import MeshConfig, make_mesh, on
from taca_jax.planning.traffic import read_traffic
from taca_jax.weights.abstract import abstract_on_mesh
from taca_jax.weights.loading import LoadOptions

BATCH, TEXT, SIDE = 16, 512, 64
BLOCKS = dataclasses.replace(FLUX_DEV, num_double_blocks=1, num_single_blocks=1)


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices
    mesh = make_mesh(MeshConfig(fsdp=4), devices)
    bf16 = jnp.dtype("bfloat16")

    def adapt(model: nnx.Module) -> None:
        add_lora(model, LoRAConfig(rank=64), ATTENTION_TARGETS, rngs=nnx.Rngs(0))

    model = abstract_on_mesh(BLOCKS, LoadOptions(bf16, bf16, mesh), adapt)
    graph, trained, frozen = nnx.split(model, LoRAParam, ...)

    def array(*shape: int, dtype: jnp.dtype = bf16) -> object:
        return jax.ShapeDtypeStruct((BATCH, *shape), dtype, sharding=batch_sharding(mesh))

    number = array(dtype=jnp.dtype("float32"))
    inputs = (
        array(SIDE, SIDE, BLOCKS.latent_channels),
        number,
        array(TEXT, BLOCKS.txt_dim),
        array(BLOCKS.pooled_dim),
    )

    def gradient(trained, frozen, inputs, number):
        def loss(trained):
            model = nnx.merge(graph, trained, frozen)
            velocity = model(*inputs, guidance=number, gamma=number, lora_scale=number)
            return jnp.mean(velocity**2)

        return jax.grad(loss)(trained)

    placed = jax.tree.map(lambda x: x.sharding, trained)
    with on(mesh):
        program = jax.jit(gradient, out_shardings=placed, compiler_options=step_options())
        code = program.lower(trained, frozen, inputs, number).compile().as_text()
    kinds = ("while", "collective-permute-start", "all-gather", "all-gather-start")
    found: dict[str, float] = {kind: len(re.findall(rf"\b{kind}\(", code)) for kind in kinds}
    traffic = read_traffic(code, CHIPS["v6e"])
    found["asynchronous"] = traffic.collectives["all-gather"].asynchronous_share
    found["hidden"] = 1 - traffic.waited * CHIPS["v6e"].wire_bandwidth / traffic.together.received
    print(json.dumps(found))


if __name__ == "__main__":
    main()
