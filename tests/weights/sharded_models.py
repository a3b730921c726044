"""A model folder read onto a mesh of all devices and written again, and what moved, as JSON.

python -m tests.weights.sharded_models SOURCE DESTINATION

Each process writes, if it writes, to DESTINATION/process-N/model. In DESTINATION/process-N.json are
the shapes that it read of each tensor, those of the arrays that came to its host to be written, the
parameters of which something stayed there, and the bytes that its first device holds.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from taca_jax.formats.tensor_files import TensorFiles
from taca_jax.nn.kinds import flat_params
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.parallel.processes import join_processes
from taca_jax.weights import folders, loading
from taca_jax.weights.loading import LoadOptions


def main() -> None:
    source, destination = map(Path, sys.argv[1:])
    join_processes()
    loading.AT_ONCE = folders.AT_ONCE = 0  # no stack is too small to go layer by layer
    read: dict[str, list[tuple[int, ...]]] = {}
    brought: list[tuple[int, ...]] = []
    read_part, copied = TensorFiles.read, folders._copied

    def counted_read(tensors, name, *part):
        made = read_part(tensors, name, *part)
        read.setdefault(name, []).append(made.shape)
        return made

    def counted_copy(array, layer):
        made = copied(array, layer)
        brought.append(made.shape)
        return made

    TensorFiles.read, folders._copied = counted_read, counted_copy
    mesh = make_mesh(MeshConfig(fsdp=-1))
    model = folders.load_model(source, LoadOptions(dtype=jnp.float32, mesh=mesh))
    arrays = {path: param.get_value() for path, param in flat_params(model).items()}
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays.values())
    own = destination / f"process-{jax.process_index()}"
    folders.save_model(own / "model", model)
    # Where JAX keeps what numpy was given of an array.
    kept = [path for path, array in arrays.items() if array._npy_value is not None]
    own.with_suffix(".json").write_text(
        json.dumps({"read": read, "brought": brought, "held": held, "kept": kept})
    )


if __name__ == "__main__":
    main()
