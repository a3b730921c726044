"""The pipeline of a folder, whichever model is in it."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from taca_jax.checkpoint import kind_of, load_config
from taca_jax.errors import UserError
from taca_jax.models.stack import Remat
from taca_jax.pipelines.base import PARTS, Part, Pipeline
from taca_jax.pipelines.flux import FluxPipeline
from taca_jax.pipelines.sd3 import SD3Pipeline
from taca_jax.weights import find_weights

PIPELINES: tuple[type[Pipeline], ...] = (FluxPipeline, SD3Pipeline)


def load_pipeline(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    *,
    param_dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: Mesh | None = None,
    remat: Remat = "none",
    parts: Collection[Part] = PARTS,
) -> Pipeline:
    """`from_pretrained` of the class that the folder's transformer is of; raises as it does."""
    folder = find_weights(path)
    chosen: type[Pipeline] = FluxPipeline  # it says what is wrong with no folder of a pipeline
    if (folder / "transformer" / "config.json").is_file():
        kind = kind_of(load_config(folder / "transformer"))
        found = [each for each in PIPELINES if each.kind == kind]
        if not found:
            known = ", ".join(each.kind for each in PIPELINES)
            raise UserError(f"{folder}/transformer is of kind {kind}; expected one of {known}")
        chosen = found[0]
    return chosen.from_pretrained(
        folder, dtype, param_dtype=param_dtype, mesh=mesh, remat=remat, parts=parts
    )
