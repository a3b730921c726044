"""Compares a converted checkpoint with its source: `taca-convert verify`."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taca_jax.autoencoders.patched_vae import PATCHED_VAE_KIND
from taca_jax.autoencoders.tiny_vae import TINY_VAE_KIND
from taca_jax.autoencoders.vae import VAE_KIND, VAEConfig
from taca_jax.convert.models import source_of
from taca_jax.errors import UserError
from taca_jax.families.registry import families, family_of
from taca_jax.formats.engine import contiguous, match
from taca_jax.formats.key_table import Piece
from taca_jax.formats.tensor_files import Tensors, differences
from taca_jax.nn.kinds import kind_of, shapes_of
from taca_jax.scorers.blip import BLIP_KIND
from taca_jax.scorers.clip import CLIP_SCORE_KIND
from taca_jax.text.clip import CLIP_KIND
from taca_jax.text.qwen3 import QWEN3_KIND
from taca_jax.text.t5 import T5_KIND
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE, load_config, open_parameters
from taca_jax.weights.original_pipelines import PIPELINE_PARTS, is_diffusers
from taca_jax.weights.originals import (
    Original,
    blip_vqa,
    clip,
    clip_score,
    qwen3,
    t5,
    tiny_vae,
    transformer,
    vae,
)
from taca_jax.weights.pipeline_folders import TRANSFORMER


def verify(src: Path, dst: Path) -> list[str]:
    """Compares a model or pipeline folder with its source; returns lines to print.

    One tensor of each is in memory at a time. Raises UserError, naming the worst, if a tensor
    differs by more than rounding to its stored dtype, or if sizes do not fit.
    """
    if not (dst / PIPELINE_FILE).is_file():
        return [_compared(_source(src, load_config(dst)), dst)]
    if not is_diffusers(src):
        config = load_config(dst / TRANSFORMER)
        sources = source_of(src, family_of(config), **_unknown_fields(config)).models
        return [_compared(source, dst / made) for made, source in sources.items()]
    lines = []
    for name, made, _ in PIPELINE_PARTS:
        if (src / name).is_dir() != (dst / made).is_dir():
            raise UserError(f"only one of {src / name} and {dst / made} is there; convert it again")
        if (dst / made).is_dir():
            lines.append(_compared(_source(src / name, load_config(dst / made)), dst / made))
    return lines


def _source(src: Path, config: Any) -> Original:
    """Opens the source of a model of this config, which has the fields that a file does not."""
    kind = kind_of(config)
    single = not (src / CONFIG).is_file()
    if kind.role == "transformer":
        return transformer(src, family_of(config), **(_unknown_fields(config) if single else {}))
    readers: Mapping[str, Callable[[Path], Original]] = {
        PATCHED_VAE_KIND.name: vae,
        QWEN3_KIND.name: qwen3,
        VAE_KIND.name: lambda src: vae(src, _latents(config) if single else None),
        T5_KIND.name: t5,
        CLIP_KIND.name: lambda src: clip(
            src, num_heads=config.num_heads, activation=config.activation
        ),
        TINY_VAE_KIND.name: tiny_vae,
        CLIP_SCORE_KIND.name: clip_score,
        BLIP_KIND.name: blip_vqa,
    }
    if kind.name not in readers:
        raise UserError(f"{src} cannot be the source of a {kind.name}: that is not converted")
    return readers[kind.name](src)


def _unknown_fields(config: Any) -> dict[str, Any]:
    """The fields of a transformer's config that a single file may not determine."""
    return {name: getattr(config, name) for name in family_of(config).original.unknown_fields}


def _latents(config: VAEConfig) -> str | None:
    """The family whose scale and shift a converted autoencoder has, or None."""
    scale = (config.scaling_factor, config.shift_factor)
    for family in families():
        known = family.autoencoder
        if (known.scaling_factor, known.shift_factor) == scale:
            return family.name
    return None


@dataclass
class _Tally:
    equal: int = 0
    rounded: int = 0
    worst: tuple[float, str] = (0.0, "")
    differing: int = 0


def _compared(source: Original, dst: Path) -> str:
    config = load_config(dst)
    if config != source.config:
        ours, theirs = (dataclasses.asdict(each) for each in (config, source.config))
        fields = [
            f"{k} is {v}, there {theirs.get(k)}" for k, v in ours.items() if theirs.get(k) != v
        ]
        raise UserError(f"{dst} is not of {source.where}: {', '.join(fields) or 'another model'}")
    wanted = shapes_of(config)
    stored = open_parameters(dst)
    if problems := differences(wanted, stored.shapes):
        raise UserError(f"{dst} does not fit its {CONFIG}: {'; '.join(problems)}")
    tally = _Tally()
    for pieces in match(source.table, source.tensors, wanted).values():
        for piece in pieces:
            _compare(piece, source.tensors, stored, tally)
    count = tally.equal + tally.rounded + tally.differing
    if tally.differing:
        difference, name = tally.worst
        raise UserError(
            f"{dst} is not what {source.where} holds: {tally.differing} of {count} tensors "
            f"differ, most {name}, by {difference:.2g} of its largest value; convert it again"
        )
    dtypes = ", ".join(sorted({str(dtype) for dtype in stored.dtypes.values()}))
    return f"{dst}: {count} tensors: {tally.equal} equal, {tally.rounded} rounded to {dtypes}"


def _compare(piece: Piece, source: Tensors, stored: Tensors, tally: _Tally) -> None:
    theirs = contiguous(piece.transform.load(source.read(piece.key, piece.rows)))
    if piece.layer is None:
        ours = stored.read(piece.path)
    else:
        ours = stored.read(piece.path, slice(piece.layer, piece.layer + 1))[0]
    with np.errstate(over="ignore"):
        cast = theirs.astype(ours.dtype, copy=False)
    if not _same(ours, cast):
        tally.differing += 1
        difference = _difference(ours, theirs)
        if difference >= tally.worst[0]:
            place = piece.path if piece.layer is None else f"{piece.path}[{piece.layer}]"
            tally.worst = difference, f"{place} (there {piece.key})"
    elif _same(cast.astype(theirs.dtype, copy=False), theirs):
        tally.equal += 1
    else:
        tally.rounded += 1


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether all bits are equal, so that NaN equals NaN and -0 does not equal 0."""
    return bool(np.array_equal(_bytes(a), _bytes(b)))


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value of theirs; infinite for NaN."""
    with np.errstate(all="ignore"):
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        difference = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    return difference if np.isfinite(difference) else np.inf


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
