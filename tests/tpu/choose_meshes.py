"""What training FLUX.1-dev's LoRA, encoded before, chooses on slices where no mesh is given. Prints
JSON: of each SLICE:IMAGES-a-chip, the devices along `data` and `fsdp`, and what is recomputed.

python -m tests.tpu.choose_meshes v5p-8:4 ...
"""

import json
import sys
from dataclasses import replace

from configs import flux_taca
from taca_jax.planning.plan import devices_of
from taca_jax.planning.slices import Slice
from taca_jax.training.models import open_models


def chosen(name: str, images: int) -> tuple[int, int, str]:
    where = Slice.of(name)
    config = flux_taca.CONFIG
    data = replace(config.data, batch_size=images * where.chips, encode="cache")
    models = open_models(replace(config, data=data), published=True)
    mesh = models.choose_mesh(devices_of(where))
    return mesh.shape["data"], mesh.shape["fsdp"], models.on_mesh(mesh).remat


def main() -> None:
    asked = (each.split(":") for each in sys.argv[1:])
    print(json.dumps({name: chosen(name, int(images)) for name, images in asked}))


if __name__ == "__main__":
    main()
