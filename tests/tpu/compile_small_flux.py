"""Compiles a small FLUX's training step and denoising loop for v5e:1x1; prints memory as JSON."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from taca_jax.autoencoders.pixels import Pixels
from taca_jax.families.flux.model import FluxTransformer
from taca_jax.nn.conditioning import Conditioning
from taca_jax.sampling.loop import denoise, make_plan
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.taca import TacaConfig
from taca_jax.text.encoders import T5Text
from taca_jax.text.t5 import T5Encoder
from taca_jax.training.models import TextToImage
from taca_jax.training.step import Batch, make_trainer
from tests.training.tiny import FLUX, T5, TEXT_LENGTH, tiny_config

BATCH, SIDE, STEPS = 4, 64, 4
MODEL = dataclasses.replace(
    FLUX, num_heads=4, head_dim=64, axes_dim=(16, 24, 24), num_double_blocks=2, num_single_blocks=2
)


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1")
    mesh = Mesh(np.array(topology.devices), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())

    def placed(tree: Any) -> Any:
        """`tree`'s shapes on the TPU that is not there."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding), tree
        )

    def compiled(function: Any, arguments: Any) -> dict[str, int]:
        with jax.set_mesh(mesh):  # what tells attention that it is for a TPU
            return measured(function.lower(*placed(arguments)).compile())

    print(json.dumps({"train": compile_training(compiled), "sample": compile_sampling(compiled)}))


def compile_training(compiled: Any) -> dict[str, int]:
    types = {"rngs": nnx.Rngs(0), "dtype": jnp.dtype("bfloat16")}
    model = TextToImage(FluxTransformer(MODEL, **types), T5Text(T5Encoder(T5, **types), pad_id=0))
    config = tiny_config("unused", model=MODEL, dtype="bfloat16", taca=TacaConfig())
    trainer, trained = make_trainer(config, model, Pixels())
    state = trainer.begin(trained)
    batch = Batch(
        image=jnp.zeros((1, BATCH, SIDE, SIDE, 3), jnp.uint8),
        tokens=jnp.zeros((1, BATCH, TEXT_LENGTH), jnp.int32),
    )
    arguments = (state, trainer.frozen, batch)
    return compiled(trainer.step, arguments)


def compile_sampling(compiled: Any) -> dict[str, int]:
    transformer = FluxTransformer(MODEL, rngs=nnx.Rngs(0), dtype=jnp.dtype("bfloat16"))
    graph, state = nnx.split(transformer)

    def sample(state: nnx.State, latents: jax.Array, plan: Any, text: Conditioning) -> jax.Array:
        return denoise(nnx.merge(graph, state), latents, plan, text)[0]

    text = Conditioning(
        txt=jnp.zeros((BATCH, TEXT_LENGTH, MODEL.txt_dim)),
        pooled=jnp.zeros((BATCH, MODEL.pooled_dim)),
    )
    plan = make_plan(FlowSchedule().sigmas(STEPS, (SIDE // MODEL.patch_size) ** 2), TacaConfig())
    arguments = (state, jnp.zeros((BATCH, SIDE, SIDE, 3)), plan, text)
    return compiled(jax.jit(sample), arguments)


def measured(program: Any) -> dict[str, int]:
    memory = program.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "kernels": len(re.findall(r"%taca_attention_\w+[.\d]* = ", program.as_text())),
    }


if __name__ == "__main__":
    main()
