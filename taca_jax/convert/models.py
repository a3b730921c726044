"""Original weights to model folders, a tensor at a time."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taca_jax.config.json_text import to_json
from taca_jax.convert.writing import check_free, progress
from taca_jax.families.base import Family
from taca_jax.formats.atomic import whole_folder
from taca_jax.formats.engine import streamed
from taca_jax.formats.tensor_files import LazyTensor, summary
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.scorers.folder import TOKENIZER, TOKENIZER_FILES
from taca_jax.text.encoders import FOLDERS as TEXT_ENCODERS
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE, save_streamed
from taca_jax.weights.original_pipelines import (
    PIPELINE_PARTS,
    TOKENIZERS,
    OriginalPipeline,
    is_diffusers,
    open_original,
    parts_in_file,
)
from taca_jax.weights.originals import Original, transformer
from taca_jax.weights.pipeline_folders import TRANSFORMER, default_settings, find_tokenizers


def convert_model(
    read: Callable[..., Original], src: Path, dst: Path, dtype: str | None, **options: Any
) -> list[str]:
    """Converts the original weights at `src` to the model folder `dst`; returns lines to print.

    read: opens the weights: (src, **options) -> Original. Raises UserError, with nothing at `dst`,
    for bad weights, and for a `dst` that is not empty.
    """
    check_free(dst)
    original = read(src, **options)
    return [_write(original, dst, dtype), *_left_out(original)]


def convert_scorer(
    read: Callable[[Path], Original], src: Path, dst: Path, dtype: str | None
) -> list[str]:
    """As `convert_model`, with the tokenizer beside the weights in `dst/tokenizer`."""
    check_free(dst)
    original = read(src)
    beside = src if src.is_dir() else src.parent
    files = [beside / name for name in TOKENIZER_FILES if (beside / name).is_file()]
    with whole_folder(dst) as folder:
        line = _write(original, folder, dtype).replace(str(folder), str(dst))
        (folder / TOKENIZER).mkdir()
        for file in files:
            shutil.copy(file, folder / TOKENIZER)
    lines = [line, *_left_out(original)]
    if not files:
        lines.append(
            f"to read text, copy the files of its tokenizer ({', '.join(TOKENIZER_FILES[:3])}) "
            f"into {dst / TOKENIZER}: there are none in {beside}"
        )
    return lines


def convert_family(
    family: Family,
    src: Path,
    dst: Path,
    dtype: str | None,
    tokenizers: Path | None = None,
    **fields: Any,
) -> list[str]:
    """Converts diffusers' pipeline folder, or single files with all its models, to ours.

    Of a file only what is in it, of a folder all that belongs to its transformer. A single model
    becomes a model folder. tokenizers: where they are, if not in `src`: a folder or hub id. fields:
    fields of the transformer's config that a single file does not determine. Raises as
    `convert_model` does.
    """
    check_free(dst)
    fields = {name: value for name, value in fields.items() if value is not None}
    if (src / CONFIG).is_file():
        return convert_model(transformer, src, dst, dtype, family=family, **fields)
    if not src.is_dir() and len(parts := parts_in_file(src, family, **fields)) == 1:
        return [_write(parts[TRANSFORMER], dst, dtype), *_left_out(parts[TRANSFORMER])]
    # Everything except the tensors themselves is checked before anything is written.
    original = source_of(src, family, **fields)
    left_out = _left_out(original.models[TRANSFORMER])
    of_text = original.tokenizers if tokenizers is None else find_tokenizers(tokenizers)
    lines = _write_pipeline(original.models, original.schedule, dst, dtype, of_text)
    if not is_diffusers(src):
        lines += _lacking_tokenizers(original.models, dst)
    return [*lines, *original.notes, *_other_folders(src), *left_out]


def source_of(src: Path, family: Family, **fields: Any) -> OriginalPipeline:
    """What a pipeline is converted from: all that belongs to a folder, or what is in a file."""
    if src.is_dir():
        return open_original(src, family, **fields)
    parts = parts_in_file(src, family, **fields)
    schedule = family.schedule_of(parts[TRANSFORMER].config)
    return OriginalPipeline(parts, schedule, src.parent)


def _lacking_tokenizers(models: Mapping[str, Original], dst: Path) -> list[str]:
    """A line about tokenizers that are not in the pipeline that was written."""
    missing = [
        name
        for encoder, name in zip(TEXT_ENCODERS, TOKENIZERS, strict=True)
        if encoder in models and not (dst / name).is_dir()
    ]
    if not missing:
        return []
    said = (
        f"to read prompts, copy {', '.join(missing)} of the model's page into {dst}, or convert "
        "with --tokenizers: they are not in the file"
    )
    return [said]


def _other_folders(src: Path) -> list[str]:
    """A line about what is in a folder of diffusers and is not converted."""
    if not is_diffusers(src):
        return []
    known = {"scheduler", *TOKENIZERS, *(name for name, _, _ in PIPELINE_PARTS)}
    others = sorted(p.name for p in src.iterdir() if p.is_dir() and p.name not in known)
    return [f"left out: {', '.join(others)}"] if others else []


def _write_pipeline(
    models: Mapping[str, Original],
    schedule: FlowSchedule,
    dst: Path,
    dtype: str | None,
    tokenizers: Path,
) -> list[str]:
    """Writes a pipeline folder: models, settings, and copies of the folders in `tokenizers`."""
    settings = default_settings(models[TRANSFORMER].config, schedule)
    with whole_folder(dst) as folder:
        lines = [
            _write(model, folder / made, dtype).replace(str(folder), str(dst))
            for made, model in models.items()
        ]
        for name in TOKENIZERS:
            if (tokenizers / name).is_dir():
                shutil.copytree(tokenizers / name, folder / name)
        (folder / PIPELINE_FILE).write_text(to_json(settings))
    return lines


def _write(original: Original, dst: Path, dtype: str | None) -> str:
    tensors = streamed(original.table, original.tensors, original.config, dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with progress(dst.name, size) as advance:
        counted = {path: counting(tensor, advance) for path, tensor in tensors.items()}
        save_streamed(dst, original.config, counted)
    count = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    stored = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
    return f"{dst}: {count:,} parameters, {size / 1e6:,.1f} MB of {stored}"


def _left_out(original: Original) -> list[str]:
    names = original.left_out
    return [f"left out: {len(names)} other tensors: {summary(names)}"] if names else []


def counting(tensor: LazyTensor, advance: Callable[[int], None]) -> LazyTensor:
    """The tensor, calling `advance` with the number of bytes of each piece that was written."""

    def pieces() -> Iterator[np.ndarray]:
        for piece in tensor.pieces():
            yield piece
            advance(piece.nbytes)

    return dataclasses.replace(tensor, pieces=pieces)
