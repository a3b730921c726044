"""Original weights to model folders, a tensor at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from taca_jax.atomic import whole_folder
from taca_jax.checkpoint import CONFIG, StreamedArray, save_streamed
from taca_jax.errors import UserError
from taca_jax.formats import clip as clip_format
from taca_jax.formats import flux_bfl, flux_diffusers, vae_bfl
from taca_jax.formats import t5 as t5_format
from taca_jax.formats import tiny_vae as tiny_vae_format
from taca_jax.formats import vae as vae_format
from taca_jax.formats.engine import streamed
from taca_jax.formats.lora_files import Layout, load_adapter, save_adapter
from taca_jax.formats.settings import read_settings
from taca_jax.formats.table import Table
from taca_jax.models.clip import Activation
from taca_jax.models.tiny_vae import TAEF1
from taca_jax.models.vae import FLUX_VAE, SD3_VAE
from taca_jax.tensor_files import TensorFiles, open_tensors, summary, under

PIPELINE_FILE = "pipeline.json"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""As diffusers names them, and we: what each is, its config.json says."""


@dataclass(frozen=True)
class Source:
    """Original weights of one model: which layout, which model, and the tensors.

    `left_out` are the names of other models' tensors in the same file.
    """

    table: Table
    config: Any
    tensors: TensorFiles
    left_out: tuple[str, ...] = ()


def flux(src: Path, axes_dim: tuple[int, int, int] | None = None) -> Source:
    """A transformer: a folder in diffusers' layout, or a single file in Black Forest Labs' own.

    Their `ae.safetensors` is recognised too. `axes_dim` is asked for where a single file's shapes
    do not tell it.
    """
    if (src / CONFIG).is_file():
        _check_not_given(src, axes_dim=axes_dim)
        config = flux_diffusers.config_of(read_settings(src))
        return Source(flux_diffusers.TABLE, config, open_tensors(src))
    tensors = open_tensors(src)
    if vae_bfl.is_autoencoder(tensors):
        return _bfl_vae(tensors, "flux")
    found = _under_any(tensors, (flux_bfl.COMFY_PREFIX, ""))
    if not flux_bfl.is_flux(found):
        raise UserError(
            f"{src} is no FLUX in Black Forest Labs' names: {_names(tensors)}; of diffusers' files "
            f"give the folder with their {CONFIG}"
        )
    _check_unscaled(found)
    config = flux_bfl.inferred(found, axes_dim)
    return Source(flux_bfl.TABLE, config, found, _others(tensors, found))


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


Latents = Literal["flux", "sd3"]
LATENTS = {"flux": FLUX_VAE, "sd3": SD3_VAE}
"""Whose scale and shift of the latents; nothing in an original file says them."""
VAE_PREFIXES: tuple[tuple[str, Latents | None], ...] = (
    ("first_stage_model.", "sd3"),  # within Stability's checkpoints
    ("vae.", None),  # within ComfyUI's
    ("", None),
)


def vae(src: Path, latents: Latents | None = None) -> Source:
    """An autoencoder: a folder in diffusers' layout, or a file in the original's.

    `latents` says whose scale and shift theirs have, which is asked for where nothing tells it.
    """
    if (src / CONFIG).is_file():
        _check_not_given(src, latents=latents)
        return Source(vae_format.TABLE, vae_format.config_of(read_settings(src)), open_tensors(src))
    tensors = open_tensors(src)
    for prefix, whose in VAE_PREFIXES:
        found = under(tensors, prefix)
        if vae_bfl.is_autoencoder(found):
            source = _bfl_vae(found, latents or whose)
            return dataclasses.replace(source, left_out=_others(tensors, found))
    raise UserError(
        f"{src} is no autoencoder in the original's names: {_names(tensors)}; of diffusers' files "
        f"give the folder with their {CONFIG}"
    )


def _bfl_vae(tensors: TensorFiles, latents: Latents | None) -> Source:
    if latents is None:
        raise UserError(
            f"{tensors.where} does not say how its latents are scaled; give latents, "
            f"one of {', '.join(LATENTS)}"
        )
    config = vae_bfl.inferred(tensors, LATENTS[latents])
    return Source(vae_bfl.table_of(config), config, tensors)


def _under_any(tensors: TensorFiles, prefixes: tuple[str, ...]) -> TensorFiles:
    """The tensors under the first prefix that any has."""
    first = next(p for p in prefixes if any(name.startswith(p) for name in [*tensors.shapes, ""]))
    return under(tensors, first) if first else tensors


def _others(tensors: TensorFiles, found: TensorFiles) -> tuple[str, ...]:
    used = set(found.places.values())
    return tuple(name for name, place in tensors.places.items() if place not in used)


def _names(tensors: TensorFiles) -> str:
    return f"it has {summary(sorted(tensors.shapes), limit=3) or 'no tensors'}"


def _check_unscaled(tensors: TensorFiles) -> None:
    """Raises UserError for float8 weights whose values are only right times a stored scale."""
    scales = [name for name in tensors.shapes if name.endswith(("scale_weight", "scale_input"))] + [
        name for name in tensors.shapes if name == "scaled_fp8"
    ]
    if scales:
        raise UserError(
            f"{tensors.where} has weights that are to be multiplied by {len(scales)} scales: "
            f"{summary(scales)}; scaled float8 is not supported: give unscaled weights"
        )


def _check_not_given(src: Path, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{src / CONFIG} tells {name}; leave {name} out")


def tiny_vae(src: Path) -> Source:
    """The two files of a TAESD-style autoencoder; all published ones are of one size."""
    return Source(tiny_vae_format.TABLE, TAEF1, tiny_vae_format.open_taesd(src))


def text_encoder(src: Path) -> Source:
    """A CLIP or a T5 in transformers' layout, whichever the folder's config.json says it is."""
    settings = read_settings(src)
    settings.expect("model_type", "clip_text_model", "t5")
    return t5(src) if settings["model_type"] == "t5" else clip(src)


PIPELINE_PARTS = (
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
    _check_not_given(src / "transformer", axes_dim=axes_dim)
    _check_free(dst)
    # Everything is read and checked, bar the tensors themselves, before anything is written.
    sources = {
        made: read(src / name) for name, made, read in PIPELINE_PARTS if (src / name).is_dir()
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
    known = {"scheduler", *TOKENIZERS, *(name for name, _, _ in PIPELINE_PARTS)}
    left_out = sorted(p.name for p in src.iterdir() if p.is_dir() and p.name not in known)
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    return lines


def convert_lora(src: Path, dst: Path, to: Layout) -> list[str]:
    """Writes the LoRA file `dst` of the one at `src`. Raises UserError as `convert_model` does."""
    if dst.exists():
        raise UserError(f"{dst} exists; give a new name or remove it")
    file = load_adapter(src)
    written = save_adapter(dst, file.adapter, to)
    return [f"{src}: {file.summary}", f"{dst}: {written}"]


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
