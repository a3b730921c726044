"""The pipeline at a path, whichever model it is of."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from taca_jax.errors import UserError
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.families.sd3.pipeline import SD3Pipeline
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.stacking import Remat
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.weights.folders import kind_of
from taca_jax.weights.pipeline_folders import ROLES, TRANSFORMER, Role, open_parts
from taca_jax.weights.shipped import find_weights

PIPELINES: tuple[type[Pipeline], ...] = (FluxPipeline, SD3Pipeline)


def load_pipeline(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    *,
    param_dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: Mesh | None = None,
    remat: Remat = "none",
    quantize: Quantization = "none",
    quantize_text: Quantization = "none",
    only: Collection[Role] = ROLES,
) -> Pipeline:
    """`from_pretrained` of the class that the transformer at `path` is of; raises as it does.

    `only` is as of `from_parts`.
    """
    parts = open_parts(find_weights(path))
    kind = kind_of(parts.models[TRANSFORMER].config)
    found = [each for each in PIPELINES if each.kind == kind]
    if not found:
        known = ", ".join(each.kind for each in PIPELINES)
        where = parts.models[TRANSFORMER].where
        raise UserError(f"{where} is of kind {kind}; expected one of {known}")
    return found[0].from_parts(
        parts,
        dtype,
        param_dtype=param_dtype,
        mesh=mesh,
        remat=remat,
        quantize=quantize,
        quantize_text=quantize_text,
        only=only,
    )
