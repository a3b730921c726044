"""Original weights to model folders, a tensor at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from taca_jax.atomic import whole_folder
from taca_jax.checkpoint import CONFIG, StreamedArray, save_streamed
from taca_jax.errors import UserError
from taca_jax.formats import clip as clip_format
from taca_jax.formats import flux_diffusers
from taca_jax.formats import t5 as t5_format
from taca_jax.formats import tiny_vae as tiny_vae_format
from taca_jax.formats import vae as vae_format
from taca_jax.formats.engine import streamed
from taca_jax.formats.lora_factors import summarise
from taca_jax.formats.lora_files import Layout, load_adapter, save_adapter
from taca_jax.formats.settings import read_settings
from taca_jax.formats.table import Table
from taca_jax.models.clip import Activation
from taca_jax.models.tiny_vae import TAEF1
from taca_jax.tensor_files import TensorFiles, open_tensors

PIPELINE_FILE = "pipeline.json"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""As diffusers names them, and we: what each is, its config.json says."""


@dataclass(frozen=True)
class Source:
    """Original weights of one model: which layout, which model, and the tensors."""

    table: Table
    config: Any
    tensors: TensorFiles


def flux(src: Path) -> Source:
    """A transformer's folder in diffusers' layout."""
    config = flux_diffusers.config_of(read_settings(src))
    return Source(flux_diffusers.TABLE, config, open_tensors(src))


def t5(src: Path) -> Source:
    """A T5 encoder in transformers' layout: its folder, or the weights alone."""
    tensors = open_tensors(src)
    if (src / CONFIG).is_file():
        config = t5_format.config_of(read_settings(src))
    else:
        config = t5_format.inferred(tensors)
    return Source(t5_format.TABLE, config, tensors)


def clip(
    src: Path, *, num_heads: int | None = None, activation: Activation | None = None
) -> Source:
    """A CLIP text encoder in transformers' layout: its folder, or the weights alone.

    What the shapes do not tell may be given; a config.json tells it.
    """
    tensors = open_tensors(src)
    if (src / CONFIG).is_file():
        config = clip_format.config_of(read_settings(src), tensors)
        given = {"num_heads": num_heads, "activation": activation}
        for name, value in given.items():
            if value not in (None, getattr(config, name)):
                raise UserError(
                    f"{src / CONFIG} says {name} is {getattr(config, name)}, the command line "
                    f"{value}; leave it out there"
                )
    else:
        config = clip_format.inferred(tensors, num_heads=num_heads, activation=activation)
    return Source(clip_format.table_of(tensors), config, tensors)


def vae(src: Path) -> Source:
    """An autoencoder's folder in diffusers' layout."""
    return Source(vae_format.TABLE, vae_format.config_of(read_settings(src)), open_tensors(src))


def tiny_vae(src: Path) -> Source:
    """The two files of a TAESD-style autoencoder; all published ones are of one size."""
    return Source(tiny_vae_format.TABLE, TAEF1, tiny_vae_format.open_taesd(src))


def text_encoder(src: Path) -> Source:
    """A CLIP or a T5 in transformers' layout, whichever the folder's config.json says it is."""
    settings = read_settings(src)
    settings.expect("model_type", "clip_text_model", "t5")
    return t5(src) if settings["model_type"] == "t5" else clip(src)


_PIPELINE_PARTS = (
    ("transformer", "transformer", flux),
    ("vae", "autoencoder", vae),
    *((name, name, text_encoder) for name in TEXT_ENCODERS),
)
"""diffusers' folder -> ours."""


def convert_model(
    read: Callable[[Path], Source], src: Path, dst: Path, dtype: str | None
) -> list[str]:
    """Makes the model folder `dst` of the original weights at `src`; returns lines that say so.

    Raises UserError, with nothing at `dst`, for bad weights, and for a `dst` that holds something.
    """
    _check_free(dst)
    return [_write(read(src), dst, dtype)]


def convert_flux(src: Path, dst: Path, dtype: str | None) -> list[str]:
    """Makes a pipeline folder of a diffusers pipeline folder, or a model folder of a transformer's.

    Raises as `convert_model` does.
    """
    if not (src / "transformer").is_dir():
        return convert_model(flux, src, dst, dtype)
    _check_free(dst)
    # Everything is read and checked, bar the tensors themselves, before anything is written.
    sources = {
        made: read(src / name) for name, made, read in _PIPELINE_PARTS if (src / name).is_dir()
    }
    settings = _pipeline_settings(src, sources["transformer"].config)
    with whole_folder(dst) as folder:
        lines = [
            _write(source, folder / made, dtype).replace(str(folder), str(dst))
            for made, source in sources.items()
        ]
        for name in TOKENIZERS:
            if (src / name).is_dir():
                shutil.copytree(src / name, folder / name)
        (folder / PIPELINE_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    known = {"scheduler", *TOKENIZERS, *(name for name, _, _ in _PIPELINE_PARTS)}
    left_out = sorted(p.name for p in src.iterdir() if p.is_dir() and p.name not in known)
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    return lines


def convert_lora(src: Path, dst: Path, to: Layout) -> list[str]:
    """Writes the LoRA file `dst` of the one at `src`. Raises UserError as `convert_model` does."""
    if dst.exists():
        raise UserError(f"{dst} exists; give a new name or remove it")
    adapter = load_adapter(src)
    save_adapter(dst, adapter, to)
    return [f"{dst}: {summarise(adapter)}, in the {to} layout"]


def _pipeline_settings(src: Path, config: Any) -> dict[str, Any]:
    """What a pipeline is told beside its weights (PipelineSettings), from diffusers' folder."""
    schedule = flux_diffusers.schedule_of(read_settings(src / "scheduler", "scheduler_config.json"))
    call = flux_diffusers.DEV_CALL if config.guidance_embed else flux_diffusers.SCHNELL_CALL
    return {"tokenizer": None, **call, "schedule": dataclasses.asdict(schedule)}


def _write(source: Source, dst: Path, dtype: str | None) -> str:
    arrays = streamed(source.table, source.tensors, source.config, dtype)
    size = sum(_nbytes(array) for array in arrays.values())
    with _progress(dst.name, size) as advance:
        save_streamed(
            dst, source.config, {path: _counted(array, advance) for path, array in arrays.items()}
        )
    count = sum(int(np.prod(array.shape)) for array in arrays.values())
    stored = ", ".join(sorted({str(array.dtype) for array in arrays.values()}))
    return f"{dst}: {count:,} parameters, {size / 1e6:,.1f} MB of {stored}"


def _counted(array: StreamedArray, advance: Callable[[int], None]) -> StreamedArray:
    def pieces() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for index, piece in array.pieces():
            yield index, piece
            advance(piece.nbytes)

    return dataclasses.replace(array, pieces=pieces)


def _nbytes(array: StreamedArray) -> int:
    return int(np.prod(array.shape)) * array.dtype.itemsize


@contextmanager
def _progress(name: str, size: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=size)
        yield lambda amount: progress.advance(task, amount)


def _check_free(dst: Path) -> None:
    if dst.is_file() or (dst.is_dir() and any(dst.iterdir())):
        raise UserError(f"{dst} exists and is not empty; give a new folder or empty that one")
