"""Draws on one device and on meshes of eight virtual ones; prints, as JSON, the largest difference
of any latent, by mesh.

python -m tests.families.flux2.drawn_on_mesh FOLDER
"""

import json
import sys
from dataclasses import replace

import jax
import numpy as np

import taca_jax as tj
from taca_jax.families.flux2.diffusers import SCHEDULE
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.weights.pipeline_folders import PipelineSettings
from tests.families.flux2.tiny import FLUX2
from tests.random_models import random_model

MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "mixed": MeshConfig(fsdp=2, context=2, tensor=2),
}


def main() -> None:
    (folder,) = sys.argv[1:]
    settings = PipelineSettings(
        tokenizer=None, text_length=5, resolution=64, steps=2, guidance=3.0, schedule=SCHEDULE
    )
    model = random_model(replace(FLUX2, num_heads=4))
    tj.Flux2Pipeline(
        model, text_encoder=None, tokenizer=None, autoencoder=None, settings=settings
    ).save(folder)
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(3, 5, FLUX2.txt_dim)).astype(np.float32)
    call = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": embeds[:1] / 2,
        "taca": tj.TacaConfig(gamma=1.5, first_steps=1),
        "output": "latents",
    }
    alone = tj.Flux2Pipeline.from_pretrained(folder, "float32", mesh=None)(**call).latents
    found = {}
    for name, config in MESHES.items():
        mesh = make_mesh(config, jax.devices())
        drawn = tj.Flux2Pipeline.from_pretrained(folder, "float32", mesh=mesh)(**call).latents
        found[name] = float(np.abs(np.asarray(drawn) - np.asarray(alone)).max())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
