"""Describes a file or folder: `taca-convert inspect`."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from taca_jax.autoencoders import (
    patched_vae_layout,
    tiny_vae_layout,
    vae_diffusers,
    vae_original,
)
from taca_jax.convert.loras import doubts
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import families
from taca_jax.formats.float8 import ScaledTensors, unscaled
from taca_jax.formats.lora.native import is_native
from taca_jax.formats.settings import read_settings
from taca_jax.formats.tensor_files import TensorFiles, Tensors, open_tensors, summary, under
from taca_jax.hub.ids import hub_id
from taca_jax.nn.kinds import kind_of
from taca_jax.scorers import blip_layout
from taca_jax.scorers import clip_layout as clip_score_layout
from taca_jax.text import clip_layout, qwen3_layout, t5_layout
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE, load_config, open_parameters
from taca_jax.weights.hub_files import pipeline_files
from taca_jax.weights.loose_files import loose_files
from taca_jax.weights.lora_files import load_adapter
from taca_jax.weights.original_pipelines import PIPELINE_PARTS
from taca_jax.weights.originals import (
    ENCODERS,
    Original,
    autoencoder_prefixes,
    blip_vqa,
    clip_score,
    family_in,
    others,
    tiny_vae,
    transformer,
    vae,
)
from taca_jax.weights.shipped import find_weights


def _readers() -> dict[str, Callable[[Path], Original]]:
    """Functions that open a model, by the class or type in an original's config.json."""
    return {
        **{family.diffusers.class_name: transformer for family in families()},
        vae_diffusers.CLASS: vae,
        patched_vae_layout.CLASS: vae,
        tiny_vae_layout.CLASS: tiny_vae,
        **ENCODERS,
        clip_score_layout.MODEL_TYPE: clip_score,
        blip_layout.MODEL_TYPE: blip_vqa,
    }


def inspect_weights(path: Path) -> list[str]:
    """Lines that describe `path`, as `inspect` does, or a model of the hub. Of the hub's files only
    headers and configs are fetched; a LoRA is fetched whole, since some of what is said of it is in
    its values.

    Raises UserError as `inspect` does, and for what the hub does not give.
    """
    found = None if path.exists() else hub_id(str(path))
    if found is None:
        return inspect(find_weights(path))
    from taca_jax.hub.fetching import fetch, fetch_headers  # slow to import

    with tempfile.TemporaryDirectory() as folder:
        opened = fetch_headers(found, pipeline_files, Path(folder))
        if opened.is_file() and _is_lora(open_tensors(opened)):
            return inspect(fetch(found, pipeline_files))
        try:
            return [line.replace(f"{folder}/", "") for line in inspect(opened)]
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/", "")) from error


def inspect(path: Path) -> list[str]:
    """Lines that describe `path`: layout, model, sizes, dtype; of a LoRA also its targets.

    Raises UserError if nothing is there, or if it is damaged or unknown.
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
        if files := [Path(each) for each in loose_files(path).files]:
            return _each(files, _tensors)
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
        f"{folder}: a model folder of kind {kind_of(config).name}",
        _sizes(open_parameters(folder)),
        _config(config),
    ]


def _original_folder(folder: Path) -> list[str]:
    settings = read_settings(folder)
    name = settings.get("_class_name", settings.get("model_type", None))
    readers = _readers()
    if not isinstance(name, str) or name not in readers:
        raise UserError(
            f"{folder / CONFIG} is of {name!r}; known are {', '.join(readers)} and our own"
        )
    return _described(str(folder), readers[name](folder))


def _tensors(path: Path) -> list[str]:
    """Describes weights without a config: a LoRA, or models recognised by their tensors' names."""
    tensors = open_tensors(path)
    if _is_lora(tensors):
        file = load_adapter(path)
        return [
            f"{path}: of {file.family.name}: {file.summary}",
            *(f"  {line}" for line in doubts(file)),
            _sizes(tensors),
            *_metadata(tensors),
        ]
    if blip_layout.is_original(tensors):
        return _described(str(path), blip_vqa(path))
    lines: list[str] = []
    models = list(_models(tensors))
    for prefix, found, read in models:
        lines += read(f"{path}: under {prefix}: " if prefix else f"{path}: ", found)
    left = others(tensors, *(found for _, found, _ in models))
    if not lines and (pair := tiny_vae_layout.beginning_of_pair(path)) is not None:
        return _described(str(pair), tiny_vae(pair))
    if not lines:
        raise UserError(f"{path} is nothing that is known: it has {summary(left) or 'no tensors'}")
    return [*lines, *([f"{path}: {len(left)} other tensors: {summary(left)}"] if left else [])]


def _is_lora(tensors: TensorFiles) -> bool:
    dialects = [each for family in families() for each in family.lora.dialects(None)]
    return is_native(tensors) or any(d.find(key) for d in dialects for key in tensors.shapes)


Describe = Callable[[str, TensorFiles], list[str]]
"""(beginning of the first line, a model's tensors) -> lines that describe it."""


def _models(tensors: TensorFiles) -> Iterator[tuple[str, TensorFiles, Describe]]:
    """Each model in a file: its prefix, its tensors, and the function that describes it."""
    if (found := family_in(tensors)) is not None:
        family, own = found
        prefix = next(
            p for p in family.original.prefixes if family.original.recognises(under(tensors, p))
        )
        yield prefix, own, partial(_transformer, family)
    for prefix, _ in autoencoder_prefixes():
        found = under(tensors, prefix)
        if vae_original.is_autoencoder(found):
            yield prefix, found, _autoencoder
    prefixes = {prefix for family in families() for prefix in family.original.text_encoders}
    for prefix in (*sorted(prefixes), ""):
        found = under(tensors, prefix)
        if t5_layout.is_t5(found):
            yield prefix, found, _t5
        if qwen3_layout.is_qwen3(found):
            yield prefix, found, _qwen3
        if clip_layout.is_clip(found):
            yield prefix, found, _clip


def _transformer(family: Family, where: str, tensors: TensorFiles) -> list[str]:
    layout = family.original
    try:
        name = layout.table_of(layout.config_of(tensors)).name
    except UserError:
        name = f"a {family.title} transformer in {layout.whose} layout"
    return _inferred(where, name, tensors, layout.config_of)


def _t5(where: str, tensors: TensorFiles) -> list[str]:
    return _inferred(where, t5_layout.TABLE.name, tensors, t5_layout.inferred)


def _qwen3(where: str, tensors: TensorFiles) -> list[str]:
    return _inferred(where, qwen3_layout.NAME, tensors, qwen3_layout.inferred)


def _clip(where: str, tensors: TensorFiles) -> list[str]:
    return _inferred(where, clip_layout.table_of(tensors).name, tensors, clip_layout.inferred)


def _inferred(
    where: str, name: str, tensors: TensorFiles, infer: Callable[[TensorFiles], Any]
) -> list[str]:
    try:
        config = _config(infer(tensors))
        tensors = unscaled(tensors)
    except UserError as error:  # the layout is known all the same
        config = f"  config: {error}"
    return [f"{where}{name}", _sizes(tensors), config]


def _autoencoder(where: str, tensors: TensorFiles) -> list[str]:
    if patched_vae_layout.is_patched(tensors):
        layout = patched_vae_layout
        return _inferred(where, layout.ORIGINAL, tensors, layout.inferred)
    config = vae_original.inferred(tensors, like=families()[0].autoencoder)
    fields = _config(config, without=("scaling_factor", "shift_factor"))
    return [
        f"{where}{vae_original.table_of(config).name}",
        _sizes(tensors),
        f"{fields}; scale and shift of the latents are not in the file",
    ]


def _described(where: str, original: Original) -> list[str]:
    return [f"{where}: {original.table.name}", _sizes(original.tensors), _config(original.config)]


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
