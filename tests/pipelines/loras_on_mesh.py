"""Two LoRAs on a pipeline over a mesh of all devices, and what it draws.

python -m tests.pipelines.loras_on_mesh MODEL PICTURES FIRST SECOND

FIRST is loaded twice, so that one is removed too. The first process writes PICTURES (.npy), from
one seed for each device.
"""

import sys

import jax
import numpy as np

from taca_jax.nn.lora import linears
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.parallel.processes import is_first, join_processes
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig


def main() -> None:
    model, pictures, first, second = sys.argv[1:]
    join_processes()
    pipeline = Pipeline.from_pretrained(model, "float32", mesh=make_mesh(MeshConfig(fsdp=-1)))
    for lora in (first, f"{second}:0.8", first):
        pipeline.load_lora(lora)
    for path, layer in linears(pipeline.transformer):
        for factor in (layer.lora_a, layer.lora_b):
            if factor is not None and "fsdp" not in str(factor.get_value().sharding.spec):
                raise SystemExit(f"{path}: factors are {factor.get_value().sharding}")
    taca = TacaConfig(gamma=1.5, threshold=500)
    drawn = pipeline("a red circle", taca=taca, num_images=jax.device_count(), output="array")
    if is_first():
        np.save(pictures, drawn.images)


if __name__ == "__main__":
    main()
