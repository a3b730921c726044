"""Exports our model folders to other layouts: `taca-convert export`."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from taca_jax.autoencoders import patched_vae_layout, vae_diffusers, vae_original
from taca_jax.autoencoders.patched_vae import PATCHED_VAE_KIND
from taca_jax.autoencoders.vae import VAE_KIND
from taca_jax.convert.models import counting
from taca_jax.convert.writing import check_free, progress
from taca_jax.errors import UserError
from taca_jax.families.registry import families
from taca_jax.formats.atomic import whole_folder
from taca_jax.formats.engine import exported
from taca_jax.formats.key_table import Table
from taca_jax.formats.tensor_files import LazyTensor, write_streamed
from taca_jax.nn.kinds import kind_of
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE, load_config, open_parameters
from taca_jax.weights.original_pipelines import PIPELINE_PARTS

Layout = Literal["diffusers", "original"]

NAME = "diffusion_pytorch_model"
"""File name of the weights in diffusers' folders."""
METADATA = {"format": "pt"}
"""Header metadata that diffusers requires."""


@dataclass(frozen=True)
class _Format:
    """How to export a model: diffusers' config.json and key table, and the original layout's."""

    settings_of: Callable[[Any], Mapping[str, Any]]
    diffusers: Callable[[Any], Table]
    original: Callable[[Any], Table]
    prefix: str = ""


_AUTOENCODERS = {
    VAE_KIND.name: _Format(
        vae_diffusers.settings_of, lambda _: vae_diffusers.TABLE, vae_original.table_of
    ),
    PATCHED_VAE_KIND.name: _Format(
        patched_vae_layout.settings_of,
        lambda _: patched_vae_layout.TABLE,
        patched_vae_layout.original_table_of,
    ),
}


def _formats() -> dict[str, _Format]:
    """The formats, by kind of model."""
    transformers = {
        family.name: _Format(
            family.diffusers.settings_of,
            family.diffusers.table_of,
            family.original.table_of,
            family.original.written_prefix,
        )
        for family in families()
    }
    return transformers | _AUTOENCODERS


def export(src: Path, dst: Path, to: Layout, dtype: str | None, shard_bytes: int) -> list[str]:
    """Writes a model folder in another layout, or all supported models of a pipeline folder.

    to: `diffusers`, a folder with weights in shards of at most `shard_bytes` unless one tensor is
    larger, or `original`, one file. Returns lines to print. Raises UserError, with nothing at
    `dst`, for models that have no such layout, and for a `dst` that is not empty.
    """
    check_free(dst)
    if not (src / PIPELINE_FILE).is_file():
        return [_export(src, dst, dst, to, dtype, shard_bytes)]
    if to == "original":
        raise UserError(f"{src} has several models; give one of its folders for one file of it")
    theirs = {made: name for name, made, _ in PIPELINE_PARTS}
    formats = _formats()
    lines, left_out = [], []
    with whole_folder(dst) as folder:
        for part in sorted(each for each in src.iterdir() if each.is_dir()):
            if part.name in theirs and kind_of(load_config(part)).name in formats:
                name = theirs[part.name]
                lines.append(_export(part, folder / name, dst / name, to, dtype, shard_bytes))
            else:
                left_out.append(part.name)
        if not lines:
            raise UserError(f"{src} holds no model that diffusers reads: {', '.join(left_out)}")
    return [*lines, *([f"left out: {', '.join(left_out)}"] if left_out else [])]


def _export(
    src: Path, made: Path, shown: Path, to: Layout, dtype: str | None, shard_bytes: int
) -> str:
    config = load_config(src)
    kind, formats = kind_of(config).name, _formats()
    if kind not in formats:
        raise UserError(f"{src} is a {kind}; export writes {', '.join(formats)}")
    form = formats[kind]
    table = form.diffusers(config) if to == "diffusers" else form.original(config)
    settings = form.settings_of(config) if to == "diffusers" else {}
    tensors = exported(table, open_parameters(src), dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with progress(shown.name, size) as advance:
        counted = {key: counting(tensor, advance) for key, tensor in tensors.items()}
        if to == "original":
            write_streamed(made, {form.prefix + key: t for key, t in counted.items()}, METADATA)
        else:
            with whole_folder(made) as folder:
                _write_shards(folder, counted, shard_bytes)
                (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    stored = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
    return f"{shown}: {table.name}, {len(tensors)} tensors, {size / 1e6:,.1f} MB of {stored}"


def _write_shards(folder: Path, tensors: Mapping[str, LazyTensor], shard_bytes: int) -> None:
    """Writes one file, or several with an index, named as in transformers and diffusers."""
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return write_streamed(folder / f"{NAME}.safetensors", shards[0], METADATA)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{NAME}-{number:05}-of-{len(shards):05}.safetensors"
        write_streamed(folder / file, shard, METADATA)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return None


def _shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> Iterator[dict[str, LazyTensor]]:
    """The tensors in order, in groups of at most `shard_bytes` or of one tensor."""
    shard: dict[str, LazyTensor] = {}
    size = 0
    for key, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    yield shard
