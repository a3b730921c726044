"""Draws the same pictures on one device and on meshes of eight virtual ones; prints, as JSON, the
largest difference of any pixel and the shape of the mesh, by case.

python -m tests.pipelines.drawn_on_meshes FOLDER CASE ...
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig
from tests.training.tiny import FLUX, tiny_pipeline

PROMPT = "a red circle and a blue square"
OPTIONS = {
    "guidance": 3.0,
    "taca": TacaConfig(gamma=1.5, threshold=500),
    "output": "array",
    "height": 64,
}
CASES = {
    "fsdp": (8, MeshConfig(fsdp=8), 3),
    "data": (8, MeshConfig(data=8, fsdp=1), 8),
    "tensor": (4, MeshConfig(fsdp=1, tensor=4), 1),
    "context": (8, MeshConfig(fsdp=1, context=8), 1),
    "mixed": (8, MeshConfig(fsdp=2, context=2, tensor=2), 3),
    "open, one": (8, MeshConfig(), 1),
    "open, four": (8, MeshConfig(), 4),
}
"""Devices, their mesh, and the pictures drawn."""


def main() -> None:
    folder, *names = sys.argv[1:]
    tiny_pipeline(dataclasses.replace(FLUX, num_heads=4)).save(folder)
    alone = Pipeline.from_pretrained(folder, "float32", mesh=None)
    expected = np.asarray(alone(PROMPT, num_images=8, **OPTIONS).images)
    found = {}
    for name in names:
        devices, config, count = CASES[name]
        # What is open is chosen by the pipeline itself, as where nothing is said.
        mesh = config if config.open else make_mesh(config, jax.devices()[:devices])
        pipeline = Pipeline.from_pretrained(folder, "float32", mesh=mesh, samples=2 * count)
        seen = []
        drawn = pipeline(
            PROMPT,
            num_images=count,
            trajectory=True,
            callback=lambda _, latents, seen=seen: seen.append(latents.shape),
            **OPTIONS,
        )
        images = np.asarray(drawn.images)
        assert images.shape[0] == count
        assert seen == [drawn.latents.shape] * len(pipeline.timesteps())
        assert drawn.trajectory is not None
        np.testing.assert_allclose(drawn.trajectory.latents[-1], drawn.latents)
        found[name] = {
            "difference": float(np.abs(images - expected[:count]).max()),
            "mesh": {axis: n for axis, n in pipeline.mesh.shape.items() if n > 1},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
