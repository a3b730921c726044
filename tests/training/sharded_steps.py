"""Training steps on meshes of eight virtual devices; prints their distance from one device as JSON.

python -m tests.training.sharded_steps FOLDER QUANTIZATION OPTIMIZER [MESH ...]

On a base whose kernels are kept as QUANTIZATION says, for each mesh (all, where none is named): the
loss and the gradient's norm of two steps, the validation loss and the trained parameters after
them, as relative errors; and how many bytes of the base the first device holds, of all (of its
quantised kernels, where there are some: small as they are, what is whole would outweigh them).
"""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from taca_jax.data.config import DataConfig
from taca_jax.nn.layers import LoRAParam, Quantized
from taca_jax.nn.lora import LoRAConfig
from taca_jax.parallel.batches import batch_sharding
from taca_jax.parallel.mesh import MeshConfig, make_mesh, on
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.training.config import ValidationConfig
from taca_jax.training.inputs import open_examples
from taca_jax.training.models import TextToImage, open_models
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.step import Batch, make_trainer
from taca_jax.training.validation import Validation
from tests.training.tiny import FLUX, arrays, tiny_config, tiny_pipeline

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(data=4, fsdp=1, tensor=2),
    "context": MeshConfig(context=4, fsdp=2),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}
LARGE = replace(FLUX, head_dim=64, axes_dim=(16, 24, 24))
STEPS = 2


def main() -> None:
    folder, quantization, optimizer, *names = sys.argv[1:]
    # Adafactor makes rows and columns only of large factors.
    large = optimizer == "adafactor"
    tiny_pipeline(LARGE if large else FLUX).save(folder)
    config = tiny_config(
        "unused",
        base=folder,
        model=None,
        text=TextConfig(),
        lora=LoRAConfig(rank=LARGE.hidden if large else 4),
        quantize=quantization,
        quantize_text=quantization,
        taca=TacaConfig(threshold=500),
        data=DataConfig(source="generated:shapes/64", batch_size=8, resolution=40),
        optimizer=OptimizerConfig(optimizer, learning_rate=1e-2),
        validation=ValidationConfig(pictures=11, timesteps=2),
    )
    models = open_models(config)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS, 1, 8, 40, 40, 3), np.uint8)
    tokens = rng.integers(3, 33, (STEPS, 1, 8, 16), np.int32)

    def run(mesh):
        placed = models.on_mesh(mesh)
        transformer, inputs = placed.load_transformer(), placed.load_inputs()
        # B is zero at first, and A's gradient with it: begin where both count.
        for _, layer in nnx.iter_graph(transformer):
            if getattr(layer, "lora_b", None) is not None:
                layer.lora_b[...] = jax.random.normal(jax.random.key(1), layer.lora_b.shape) * 0.1
        model = TextToImage(transformer, inputs.text_encoder)
        kind = nnx.Not(nnx.OfType(LoRAParam)) if quantization == "none" else Quantized
        base = jax.tree.leaves(nnx.state(model.transformer, kind))
        local = sum(x.addressable_shards[0].data.nbytes for x in base)
        share = local / sum(x.nbytes for x in base)
        trainer, trained = make_trainer(config, model, inputs.autoencoder, mesh)
        state = trainer.begin(trained)
        seen = []
        for i in range(STEPS):
            batch = Batch(images[i], tokens[i])
            if mesh is not None:
                batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
            state, metrics = trainer.run(state, batch)
            seen += [float(metrics["loss"]), float(metrics["gradient_norm"])]
        _, held_out = open_examples(placed, inputs)
        seen.append(Validation(placed, inputs, held_out).loss(trainer, state.trained))
        return np.array(seen), jax.device_get(arrays(state.trained)), share

    numbers, parameters, _ = run(None)
    found = {}
    for name in names or MESHES:
        mesh = make_mesh(MESHES[name])
        with on(mesh):
            again, trained, share = run(mesh)
        difference = sum(float(((trained[k] - v) ** 2).sum()) for k, v in parameters.items())
        norm = sum(float((v**2).sum()) for v in parameters.values())
        found[name] = {
            "numbers": float(np.abs(again / numbers - 1).max()),
            "parameters": (difference / norm) ** 0.5,
            "share": share,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
