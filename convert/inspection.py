"""What a file or a folder is: `python -m convert inspect`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from convert.loras import doubts
from convert.stored import open_stored
from taca_jax.autoencoders import vae_diffusers as vae_format
from taca_jax.autoencoders import vae_original as vae_bfl
from taca_jax.autoencoders.tiny_vae_layout import beginning_of_pair
from taca_jax.errors import UserError
from taca_jax.families.flux import bfl as flux_bfl
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.sd3 import diffusers as sd3_diffusers
from taca_jax.families.sd3 import stability as sd3_native
from taca_jax.formats.float8 import ScaledTensors, unscaled
from taca_jax.formats.key_table import Table
from taca_jax.formats.lora.native import is_native
from taca_jax.formats.settings import read_settings
from taca_jax.formats.tensor_files import TensorFiles, Tensors, open_tensors, summary, under
from taca_jax.text import clip_layout as clip_format
from taca_jax.text import t5_layout as t5_format
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE, kind_of, load_config
from taca_jax.weights.lora_files import Kind, dialects_of, load_adapter
from taca_jax.weights.original_pipelines import PIPELINE_PARTS, TEXT_PREFIXES
from taca_jax.weights.originals import (
    VAE_PREFIXES,
    Source,
    clip,
    flux,
    others,
    sd3,
    t5,
    tiny_vae,
    vae,
)

_BY_CLASS: dict[str, Callable[[Path], Source]] = {
    flux_diffusers.CLASS: flux,
    sd3_diffusers.CLASS: sd3,
    vae_format.CLASS: vae,
    "t5": t5,
    "clip_text_model": clip,
}
"""What an original's config.json calls itself."""


def inspect(path: Path) -> list[str]:
    """Lines that say what is at `path`: layout, model, sizes, dtype; of a LoRA also its targets.

    Raises UserError where nothing is there, it is damaged, or nothing that is known.
    """
    if path.is_dir():
        if (path / PIPELINE_FILE).is_file():
            models = sorted(each.parent for each in path.glob(f"*/{CONFIG}") if _is_ours(each))
            return [f"{path}: a pipeline folder", *_each(models, _model_folder)]
        parts = [path / name for name, *_ in PIPELINE_PARTS if (path / name / CONFIG).is_file()]
        if parts:
            return [f"{path}: a pipeline folder of diffusers", *_each(parts, _original_folder)]
        if (path / CONFIG).is_file():
            ours = _is_ours(path / CONFIG)
            return _model_folder(path) if ours else _original_folder(path)
    if not path.is_file() and list(path.parent.glob(f"{path.name}_*coder.safetensors")):
        return _described(str(path), tiny_vae(path))
    return _tensors(path)


def _each(folders: list[Path], describe: Callable[[Path], list[str]]) -> list[str]:
    return [line for folder in folders for line in describe(folder)]


def _is_ours(config: Path) -> bool:
    return "kind" in read_settings(config.parent).fields


def _model_folder(folder: Path) -> list[str]:
    config = load_config(folder)
    return [
        f"{folder}: a model folder of kind {kind_of(config)}",
        _sizes(open_stored(folder)),
        _config(config),
    ]


def _original_folder(folder: Path) -> list[str]:
    settings = read_settings(folder)
    name = settings.get("_class_name", settings.get("model_type", None))
    if not isinstance(name, str) or name not in _BY_CLASS:
        raise UserError(
            f"{folder / CONFIG} is of {name!r}; known are {', '.join(_BY_CLASS)} and our own"
        )
    return _described(str(folder), _BY_CLASS[name](folder))


def _tensors(path: Path) -> list[str]:
    """Weights without a config: a LoRA, or one or several models by their names."""
    tensors = open_tensors(path)
    dialects = [dialect for kind in get_args(Kind) for dialect in dialects_of(kind)]
    if is_native(tensors) or any(d.find(key) for d in dialects for key in tensors.shapes):
        file = load_adapter(path)
        return [
            f"{path}: of {file.kind}: {file.summary}",
            *(f"  {line}" for line in doubts(file)),
            _sizes(tensors),
            *_metadata(tensors),
        ]
    lines: list[str] = []
    models = list(_models(tensors))
    for prefix, found, read in models:
        lines += read(f"{path}: under {prefix}: " if prefix else f"{path}: ", found)
    left = others(tensors, *(found for _, found, _ in models))
    if not lines and (pair := beginning_of_pair(path)) is not None:
        return _described(str(pair), tiny_vae(pair))
    if not lines:
        raise UserError(f"{path} is nothing that is known: it has {summary(left) or 'no tensors'}")
    return [*lines, *([f"{path}: {len(left)} other tensors: {summary(left)}"] if left else [])]


def _models(tensors: TensorFiles):
    """(prefix, tensors, what describes them) of each model in a file."""
    for prefix in (flux_bfl.COMFY_PREFIX, ""):
        found = under(tensors, prefix)
        if flux_bfl.is_flux(found):
            yield prefix, found, _flux
        if sd3_native.is_sd3(found):
            yield prefix, found, _sd3
    for prefix, _ in VAE_PREFIXES:
        found = under(tensors, prefix)
        if vae_bfl.is_autoencoder(found):
            yield prefix, found, _autoencoder
    for prefix in (*TEXT_PREFIXES, ""):
        found = under(tensors, prefix)
        if t5_format.is_t5(found):
            yield prefix, found, _t5
        if clip_format.is_clip(found):
            yield prefix, found, _clip


def _flux(where: str, tensors: TensorFiles) -> list[str]:
    return _inferred(where, flux_bfl.TABLE, tensors, flux_bfl.inferred)


def _t5(where: str, tensors: TensorFiles) -> list[str]:
    return _inferred(where, t5_format.TABLE, tensors, t5_format.inferred)


def _clip(where: str, tensors: TensorFiles) -> list[str]:
    return _inferred(where, clip_format.table_of(tensors), tensors, clip_format.inferred)


def _inferred(
    where: str, table: Table, tensors: TensorFiles, infer: Callable[[TensorFiles], Any]
) -> list[str]:
    try:
        config = _config(infer(tensors))
        tensors = unscaled(tensors)
    except UserError as error:  # what it is can be said all the same
        config = f"  config: {error}"
    return [f"{where}{table.name}", _sizes(tensors), config]


def _sd3(where: str, tensors: TensorFiles) -> list[str]:
    table = sd3_native.table_of(sd3_native.inferred(tensors))
    return _inferred(where, table, tensors, sd3_native.inferred)


def _autoencoder(where: str, tensors: TensorFiles) -> list[str]:
    config = vae_bfl.inferred(tensors, like=vae_bfl.FLUX_VAE)
    fields = _config(config, without=("scaling_factor", "shift_factor"))
    return [
        f"{where}{vae_bfl.table_of(config).name}",
        _sizes(tensors),
        f"{fields}; scale and shift of the latents are not in the file",
    ]


def _described(where: str, source: Source) -> list[str]:
    return [f"{where}: {source.table.name}", _sizes(source.tensors), _config(source.config)]


def _sizes(tensors: Tensors) -> str:
    count = sum(int(np.prod(shape)) for shape in tensors.shapes.values())
    size = sum(
        int(np.prod(shape)) * tensors.dtypes[name].itemsize
        for name, shape in tensors.shapes.items()
    )
    dtypes = ", ".join(sorted({str(dtype) for dtype in tensors.dtypes.values()})) or "nothing"
    if isinstance(tensors, ScaledTensors):
        dtypes += f", times {len(tensors.scales)} scales"
    return (
        f"  {count:,} parameters in {len(tensors.shapes)} tensors, {size / 1e6:,.1f} MB of {dtypes}"
    )


def _config(config: Any, without: tuple[str, ...] = ()) -> str:
    fields = dataclasses.asdict(config)
    return "  config: " + " ".join(f"{k}={v}" for k, v in fields.items() if k not in without)


def _metadata(tensors: TensorFiles) -> list[str]:
    said = sorted(tensors.metadata)
    return [f"  metadata: {summary(said)}"] if said else []
