"""Original weights to model folders, a tensor at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.writing import check_free, progress
from taca_jax.atomic import whole_folder
from taca_jax.checkpoint import CONFIG, StreamedArray, save_streamed
from taca_jax.errors import UserError
from taca_jax.formats import clip as clip_format
from taca_jax.formats import flux_bfl, flux_diffusers, sd3_diffusers, sd3_native, vae_bfl
from taca_jax.formats import t5 as t5_format
from taca_jax.formats import tiny_vae as tiny_vae_format
from taca_jax.formats import vae as vae_format
from taca_jax.formats.engine import streamed
from taca_jax.formats.float8 import unscaled
from taca_jax.formats.settings import read_settings
from taca_jax.formats.table import Table
from taca_jax.models.clip import Activation
from taca_jax.models.sd3 import SD3Config
from taca_jax.models.tiny_vae import TAEF1
from taca_jax.models.vae import FLUX_VAE, SD3_VAE
from taca_jax.sampling import FlowSchedule
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
    config = flux_bfl.inferred(found, axes_dim)
    return Source(flux_bfl.TABLE, config, unscaled(found), others(tensors, found))


def sd3(src: Path) -> Source:
    """A transformer: a folder in diffusers' layout, or a single file of Stability AI's."""
    if (src / CONFIG).is_file():
        config = sd3_diffusers.config_of(read_settings(src))
        return Source(sd3_diffusers.table_of(config), config, open_tensors(src))
    tensors = open_tensors(src)
    found = _under_any(tensors, (sd3_native.PREFIX, ""))
    if not sd3_native.is_sd3(found):
        raise UserError(
            f"{src} is no Stable Diffusion 3 in Stability AI's names: {_names(tensors)}; of "
            f"diffusers' files give the folder with their {CONFIG}"
        )
    config = sd3_native.inferred(found)
    return Source(sd3_native.table_of(config), config, unscaled(found), others(tensors, found))


def t5(src: Path) -> Source:
    """A T5 encoder in transformers' layout: its folder, or the weights alone."""
    tensors = open_tensors(src)
    if (src / CONFIG).is_file():
        return Source(t5_format.TABLE, t5_format.config_of(read_settings(src)), tensors)
    return _bare_t5(tensors)


def _bare_t5(tensors: TensorFiles) -> Source:
    return Source(t5_format.TABLE, t5_format.inferred(tensors), unscaled(tensors))


def clip(
    src: Path, *, num_heads: int | None = None, activation: Activation | None = None
) -> Source:
    """A CLIP text encoder in transformers' layout: its folder, or the weights alone.

    What the shapes do not tell may be given; a config.json tells it.
    """
    tensors = open_tensors(src)
    if not (src / CONFIG).is_file():
        return _bare_clip(tensors, num_heads=num_heads, activation=activation)
    config = clip_format.config_of(read_settings(src), tensors)
    for name, value in {"num_heads": num_heads, "activation": activation}.items():
        if value not in (None, getattr(config, name)):
            raise UserError(
                f"{src / CONFIG} says {name} is {getattr(config, name)}, the command line "
                f"{value}; leave it out there"
            )
    return Source(clip_format.table_of(tensors), config, tensors)


def _bare_clip(
    tensors: TensorFiles, *, num_heads: int | None = None, activation: Activation | None = None
) -> Source:
    config = clip_format.inferred(tensors, num_heads=num_heads, activation=activation)
    return Source(clip_format.table_of(tensors), config, unscaled(tensors))


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
            return dataclasses.replace(source, left_out=others(tensors, found))
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


def others(tensors: TensorFiles, *found: TensorFiles) -> tuple[str, ...]:
    """The names of a file's tensors that are in none of those that were found in it."""
    used = {place for each in found for place in each.places.values()}
    return tuple(name for name, place in tensors.places.items() if place not in used)


def _names(tensors: TensorFiles) -> str:
    return f"it has {summary(sorted(tensors.shapes), limit=3) or 'no tensors'}"


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


def transformer(src: Path) -> Source:
    """A FLUX or a Stable Diffusion 3 in diffusers' layout, as the folder's config.json says."""
    settings = read_settings(src)
    settings.expect("_class_name", flux_diffusers.CLASS, sd3_diffusers.CLASS)
    return sd3(src) if settings["_class_name"] == sd3_diffusers.CLASS else flux(src)


PIPELINE_PARTS = (
    ("transformer", "transformer", transformer),
    ("vae", "autoencoder", vae),
    *((name, name, text_encoder) for name in TEXT_ENCODERS),
)
"""diffusers' folder -> ours."""


def sd3_parts(src: Path) -> dict[str, Source]:
    """Every model in a single file of Stability AI's, by the name of its folder in a pipeline's."""
    parts = {"transformer": sd3(src)}
    tensors = open_tensors(src)
    found = []
    for prefix, _ in VAE_PREFIXES:
        if prefix and vae_bfl.is_autoencoder(autoencoder := under(tensors, prefix)):
            parts["autoencoder"] = _bfl_vae(autoencoder, "sd3")
            found.append(autoencoder)
    for prefix, (made, read) in TEXT_PREFIXES.items():
        if (encoder := under(tensors, prefix)).shapes:
            parts[made] = read(encoder)
            found.append(encoder)
    rest = set(others(tensors, *found))
    left_out = tuple(name for name in parts["transformer"].left_out if name in rest)
    return parts | {"transformer": dataclasses.replace(parts["transformer"], left_out=left_out)}


TEXT_PREFIXES: Mapping[str, tuple[str, Callable[[TensorFiles], Source]]] = {
    "text_encoders.clip_l.transformer.": ("text_encoder", _bare_clip),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", _bare_clip),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", _bare_t5),
}
"""Within Stability's and ComfyUI's checkpoints."""


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
    _check_not_given(src / "transformer", axes_dim=axes_dim)
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
    settings = _pipeline_settings(parts["transformer"].config, sd3_diffusers.SCHEDULE)
    lines = _write_pipeline(parts, settings, dst, dtype)
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
    sources = {"transformer": read_transformer(src / "transformer")}
    for name, made, read in PIPELINE_PARTS[1:]:
        if (src / name).is_dir():
            sources[made] = read(src / name)
    config = sources["transformer"].config
    if isinstance(config, SD3Config):
        read_schedule, schedule = sd3_diffusers.schedule_of, sd3_diffusers.SCHEDULE
    else:
        read_schedule = flux_diffusers.schedule_of
        schedule = flux_diffusers.published_schedule(config)
    said = []
    if (src / "scheduler").is_dir():
        scheduler = read_settings(src / "scheduler", "scheduler_config.json")
        schedule = read_schedule(scheduler)
    else:
        said = [f"{src} has no scheduler/; the published noise levels are taken: {schedule}"]
    settings = _pipeline_settings(config, schedule)
    lines = _write_pipeline(sources, settings, dst, dtype, tokenizers=src)
    known = {"scheduler", *TOKENIZERS, *(name for name, _, _ in PIPELINE_PARTS)}
    left_out = sorted(p.name for p in src.iterdir() if p.is_dir() and p.name not in known)
    return [*lines, *said, *([f"left out: {', '.join(left_out)}"] if left_out else [])]


def _write_pipeline(
    sources: Mapping[str, Source],
    settings: Mapping[str, Any],
    dst: Path,
    dtype: str | None,
    *,
    tokenizers: Path | None = None,
) -> list[str]:
    """A pipeline's folder: its models, its settings, and the tokenizers in the folder of those."""
    with whole_folder(dst) as folder:
        lines = [
            _write(source, folder / made, dtype).replace(str(folder), str(dst))
            for made, source in sources.items()
        ]
        for name in TOKENIZERS:
            if tokenizers is not None and (tokenizers / name).is_dir():
                shutil.copytree(tokenizers / name, folder / name)
        (folder / PIPELINE_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return lines


def _pipeline_settings(config: Any, schedule: FlowSchedule) -> dict[str, Any]:
    """What a pipeline is told beside its weights (PipelineSettings)."""
    if isinstance(config, SD3Config):
        call = sd3_diffusers.call_of(config)
    else:
        call = flux_diffusers.DEV_CALL if config.guidance_embed else flux_diffusers.SCHNELL_CALL
    return {"tokenizer": None, **call, "schedule": dataclasses.asdict(schedule)}


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
