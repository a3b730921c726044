"""Draws the same pictures on one device and on meshes of eight virtual ones; prints, as JSON, the
largest difference of any pixel by mesh, and the shape of each mesh that was left open.

python -m tests.pipelines.drawn_on_meshes FOLDER
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
OPTIONS = {"guidance": 3.0, "taca": TacaConfig(gamma=1.5, threshold=500), "output": "array"}
CASES = (
    ("fsdp", 8, MeshConfig(fsdp=8), 3),
    ("data", 8, MeshConfig(data=8, fsdp=1), 8),
    ("tensor", 4, MeshConfig(tensor=4), 1),
    ("context", 8, MeshConfig(context=8), 1),
    ("mixed", 8, MeshConfig(data=2, fsdp=2, tensor=2), 3),
    ("all", 8, MeshConfig(fsdp=2, context=2, tensor=2), 5),
    ("open, one picture", 8, MeshConfig(), 1),
    ("open, four pictures", 8, MeshConfig(), 4),
)


def main() -> None:
    folder = sys.argv[1]
    tiny_pipeline(dataclasses.replace(FLUX, num_heads=4)).save(folder)
    alone = Pipeline.from_pretrained(folder, "float32", mesh=None)
    expected = np.asarray(alone(PROMPT, num_images=8, **OPTIONS).images)
    found = {"differences": {}, "open": {}}
    for name, devices, config, count in CASES:
        # One open mesh is chosen by the pipeline itself, as it is where nothing is said.
        mesh = config if config.open else make_mesh(config, jax.devices()[:devices])
        pipeline = Pipeline.from_pretrained(folder, "float32", mesh=mesh, samples=2 * count)
        seen: list[tuple[int, ...]] = []
        drawn = pipeline(
            PROMPT,
            num_images=count,
            trajectory=True,
            callback=lambda _, latents, seen=seen: seen.append(latents.shape),
            **OPTIONS,
        )
        images = np.asarray(drawn.images)
        assert images.shape[0] == drawn.latents.shape[0] == count
        assert seen == [drawn.latents.shape] * len(seen)
        assert drawn.trajectory is not None
        np.testing.assert_allclose(drawn.trajectory.latents[-1], drawn.latents)
        found["differences"][name] = float(np.abs(images - expected[:count]).max())
        if config.open:
            found["open"][name] = dict(pipeline.mesh.shape)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
