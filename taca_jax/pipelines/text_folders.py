"""The text encoders and tokenizers of a pipeline's folder.

`text_encoder/`, `text_encoder_2/` and `text_encoder_3/`, those that are there, hold models of any
kind: each one's config.json says which. The tokenizer of each is the folder `tokenizer/`,
`tokenizer_2/`, `tokenizer_3/` of the same number, as in diffusers; a T5's may be named instead.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from taca_jax.checkpoint import load_config
from taca_jax.errors import UserError
from taca_jax.models.clip import CLIPConfig, CLIPTextEncoder
from taca_jax.models.t5 import T5Config, T5Encoder
from taca_jax.text import FluxText, SD3Text
from taca_jax.tokenizers import FolderTokenizer, JoinedTokenizer, Tokenizer, load_tokenizer

SUFFIXES = ("", "_2", "_3")

Load = Callable[[Path], Any]
"""Reads a model folder."""

C = TypeVar("C")


def load_flux_text(
    folder: Path,
    load: Load,
    *,
    tokenizer: str | None,
    t5_length: int,
    txt_dim: int,
    pooled_dim: int,
) -> tuple[T5Encoder | FluxText, Tokenizer] | None:
    """What reads the prompts of a FLUX pipeline's folder, or None where a part of it is left out.

    That is CLIP and T5, or a T5 alone where the transformer's pooled embedding is as wide as T5:
    only small models trained that way are. `t5_length` are the tokens that T5 reads. `tokenizer`
    is T5's, by name or folder (within `folder` or elsewhere), or None for the folder of its number.

    Raises UserError where parts are damaged, of another width than the transformer reads
    (`txt_dim`, `pooled_dim`), or too many, and where a tokenizer is not there.
    """
    clips, t5s = _found(folder, CLIPConfig), _found(folder, T5Config)
    _at_most(folder, "CLIP", clips, 1)
    _at_most(folder, "T5", t5s, 1)
    if not t5s:
        return None
    ((t5_suffix, t5),) = t5s.items()
    if not clips and t5.dim != pooled_dim:
        return None
    _check_width(folder / f"text_encoder{t5_suffix}", t5.dim, txt_dim)
    t5_tokenizer = _t5_tokenizer(folder, t5_suffix, tokenizer, t5_length)
    if not clips:
        return load(folder / f"text_encoder{t5_suffix}"), t5_tokenizer
    ((clip_suffix, clip),) = clips.items()
    _check_width(folder / f"text_encoder{clip_suffix}", clip.dim, pooled_dim)
    joined = JoinedTokenizer((_own_tokenizer(folder, clip_suffix, clip.max_tokens), t5_tokenizer))
    models = (load(folder / f"text_encoder{suffix}") for suffix in (clip_suffix, t5_suffix))
    return FluxText(*models), joined


def load_sd3_text(
    folder: Path,
    load: Load,
    *,
    tokenizer: str | None,
    t5_length: int,
    txt_dim: int,
    pooled_dim: int,
) -> tuple[SD3Text, Tokenizer] | None:
    """What reads the prompts of a Stable Diffusion 3 pipeline's folder, or None without both CLIPs.

    CLIP-L is the first CLIP of the folder and CLIP-bigG the second; a T5 may be left out. The other
    parameters are as of `load_flux_text`.
    CLIP-bigG's tokenizer pads with "!", which the files of its `tokenizer_2/` say; a vocabulary
    and merges alone would pad with the end token, as they do in transformers.

    Raises UserError as `load_flux_text` and `SD3Text` do.
    """
    clips, t5s = _found(folder, CLIPConfig), _found(folder, T5Config)
    _at_most(folder, "CLIP", clips, 2)
    _at_most(folder, "T5", t5s, 1)
    if len(clips) < 2:
        return None
    for suffix, t5 in t5s.items():
        _check_width(folder / f"text_encoder{suffix}", t5.dim, txt_dim)
    pooled = sum(clip.projection_dim or 0 for clip in clips.values())
    if pooled != pooled_dim:
        raise UserError(
            f"the CLIPs of {folder} make a pooled embedding of {pooled}, the transformer reads "
            f"{pooled_dim}; they are of another model"
        )
    tokenizers: list[Tokenizer] = [
        _own_tokenizer(folder, suffix, clip.max_tokens) for suffix, clip in clips.items()
    ]
    for suffix in t5s:
        tokenizers.append(_t5_tokenizer(folder, suffix, tokenizer, t5_length))
    first, second = (load(folder / f"text_encoder{suffix}") for suffix in clips)
    t5 = next((load(folder / f"text_encoder{suffix}") for suffix in t5s), None)
    encoder = SD3Text(first, second, t5, width=txt_dim, t5_length=t5_length)
    return encoder, JoinedTokenizer(tuple(tokenizers))


def encoder_parts(
    encoder: T5Encoder | FluxText | SD3Text | None,
) -> dict[str, T5Encoder | CLIPTextEncoder]:
    """The models of an encoder by the name of their folders in a pipeline's."""
    match encoder:
        case FluxText():
            models = [encoder.clip, encoder.t5]
        case SD3Text():
            models = [encoder.clip_l, encoder.clip_g, encoder.t5]
        case _:
            models = [encoder]
    numbered = zip(SUFFIXES, models, strict=False)
    return {f"text_encoder{suffix}": model for suffix, model in numbered if model is not None}


def save_tokenizers(folder: Path, tokenizer: Tokenizer | None) -> bool:
    """Writes the tokenizers that are files into the folder; whether the last, T5's, was one."""
    parts = tokenizer.parts if isinstance(tokenizer, JoinedTokenizer) else (tokenizer,)
    for suffix, part in zip(SUFFIXES, parts, strict=False):
        if isinstance(part, FolderTokenizer):
            part.save(folder / f"tokenizer{suffix}")
    return isinstance(parts[-1], FolderTokenizer)


def _found(folder: Path, kind: type[C]) -> dict[str, C]:
    """The configs of the folder's text encoders of a kind, by the suffix of their names."""
    found = {}
    for suffix in SUFFIXES:
        part = folder / f"text_encoder{suffix}"
        if part.is_dir():
            config = load_config(part)
            if not isinstance(config, CLIPConfig | T5Config):
                raise UserError(f"{part} holds no text encoder but a {type(config).__name__}")
            if isinstance(config, kind):
                found[suffix] = config
    return found


def _at_most(folder: Path, name: str, found: Mapping[str, Any], most: int) -> None:
    if len(found) > most:
        names = ", ".join(f"text_encoder{suffix}" for suffix in found)
        raise UserError(f"{folder} has {len(found)} {name} encoders ({names}); expected {most}")


def _check_width(part: Path, given: int, expected: int) -> None:
    if given != expected:
        raise UserError(
            f"{part} is {given} wide, the transformer reads {expected}; it is of another model"
        )


def _own_tokenizer(folder: Path, suffix: str, length: int) -> Tokenizer:
    own = folder / f"tokenizer{suffix}"
    if not own.is_dir():
        raise UserError(
            f"{own} is not there, which text_encoder{suffix} reads prompts with; copy that folder "
            "from the original"
        )
    return load_tokenizer(str(own), length)


def _t5_tokenizer(folder: Path, suffix: str, name: str | None, length: int) -> Tokenizer:
    if name is None:
        return _own_tokenizer(folder, suffix, length)
    # Converted pipelines bring their tokenizer's folder with them.
    inside = folder / name
    return load_tokenizer(str(inside) if inside.is_dir() else name, length)
