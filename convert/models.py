"""Original weights to model folders, a tensor at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from convert.writing import check_free, progress
from taca_jax.formats.atomic import whole_folder
from taca_jax.formats.engine import streamed
from taca_jax.formats.tensor_files import summary
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE, save_streamed
from taca_jax.weights.original_pipelines import (
    PIPELINE_PARTS,
    TEXT_ENCODERS,
    TOKENIZERS,
    OriginalPipeline,
    open_folder,
    published_schedule,
    sd3_parts,
)
from taca_jax.weights.originals import Source, check_not_given, flux, sd3
from taca_jax.weights.placing import StreamedArray


def convert_model(
    read: Callable[[Path], Source], src: Path, dst: Path, dtype: str | None
) -> list[str]:
    """Makes the model folder `dst` of the original weights at `src`; returns lines that say so.

    Raises UserError, with nothing at `dst`, for bad weights, and for a `dst` that holds something.
    """
    check_free(dst)
    source = read(src)
    return [_write(source, dst, dtype), *_left_out(source)]


def convert_flux(
    src: Path, dst: Path, dtype: str | None, axes_dim: tuple[int, int, int] | None = None
) -> list[str]:
    """Makes a pipeline folder of a diffusers pipeline folder, or a model folder of one model's.

    Raises as `convert_model` does.
    """
    if not (src / "transformer").is_dir():
        return convert_model(partial(flux, axes_dim=axes_dim), src, dst, dtype)
    check_not_given(src / "transformer", axes_dim=axes_dim)
    return _convert_folder(flux, src, dst, dtype)


def convert_sd3(src: Path, dst: Path, dtype: str | None) -> list[str]:
    """Makes a pipeline folder of a diffusers pipeline folder, or of a file with several models.

    A transformer alone becomes a model folder. Raises as `convert_model` does.
    """
    if (src / "transformer").is_dir():
        return _convert_folder(sd3, src, dst, dtype)
    if (src / CONFIG).is_file():
        return convert_model(sd3, src, dst, dtype)
    check_free(dst)
    parts = sd3_parts(src)
    left_out = _left_out(parts["transformer"])
    if len(parts) == 1:
        return [_write(parts["transformer"], dst, dtype), *left_out]
    schedule = published_schedule(parts["transformer"].config)
    lines = _write_pipeline(OriginalPipeline(parts, schedule), dst, dtype)
    if missing := [
        name for made, name in zip(TEXT_ENCODERS, TOKENIZERS, strict=True) if made in parts
    ]:
        lines.append(
            f"to read prompts, copy {', '.join(missing)} of the model's page into {dst}: "
            "tokenizers are not in the file"
        )
    return [*lines, *left_out]


def _convert_folder(
    read_transformer: Callable[[Path], Source], src: Path, dst: Path, dtype: str | None
) -> list[str]:
    """Makes a pipeline folder of diffusers'. Raises as `convert_model` does."""
    check_free(dst)
    # Everything is read and checked, bar the tensors themselves, before anything is written.
    original = open_folder(src, read_transformer)
    lines = _write_pipeline(original, dst, dtype, tokenizers=src)
    known = {"scheduler", *TOKENIZERS, *(name for name, _, _ in PIPELINE_PARTS)}
    left_out = sorted(p.name for p in src.iterdir() if p.is_dir() and p.name not in known)
    said = [f"left out: {', '.join(left_out)}"] if left_out else []
    return [*lines, *original.notes, *said]


def _write_pipeline(
    original: OriginalPipeline, dst: Path, dtype: str | None, *, tokenizers: Path | None = None
) -> list[str]:
    """A pipeline's folder: its models, its settings, and the tokenizers in the folder of those."""
    settings = {
        "tokenizer": None,
        **original.call,
        "schedule": dataclasses.asdict(original.schedule),
    }
    with whole_folder(dst) as folder:
        lines = [
            _write(source, folder / made, dtype).replace(str(folder), str(dst))
            for made, source in original.sources.items()
        ]
        for name in TOKENIZERS:
            if tokenizers is not None and (tokenizers / name).is_dir():
                shutil.copytree(tokenizers / name, folder / name)
        (folder / PIPELINE_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return lines


def _write(source: Source, dst: Path, dtype: str | None) -> str:
    arrays = streamed(source.table, source.tensors, source.config, dtype)
    size = sum(_nbytes(array) for array in arrays.values())
    with progress(dst.name, size) as advance:
        save_streamed(
            dst, source.config, {path: _counted(array, advance) for path, array in arrays.items()}
        )
    count = sum(int(np.prod(array.shape)) for array in arrays.values())
    stored = ", ".join(sorted({str(array.dtype) for array in arrays.values()}))
    return f"{dst}: {count:,} parameters, {size / 1e6:,.1f} MB of {stored}"


def _left_out(source: Source) -> list[str]:
    names = source.left_out
    return [f"left out: {len(names)} other tensors: {summary(names)}"] if names else []


def _counted(array: StreamedArray, advance: Callable[[int], None]) -> StreamedArray:
    def pieces() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for index, piece in array.pieces():
            yield index, piece
            advance(piece.nbytes)

    return dataclasses.replace(array, pieces=pieces)


def _nbytes(array: StreamedArray) -> int:
    return int(np.prod(array.shape)) * array.dtype.itemsize
