"""The text encoders and tokenizers of a pipeline.

`text_encoder`, `text_encoder_2` and `text_encoder_3`, those that are there, are models of any
kind: each one's config says which. The tokenizer of each is the folder `tokenizer/`,
`tokenizer_2/`, `tokenizer_3/` of the same number, as in diffusers; a T5's may be named instead.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taca_jax.errors import UserError
from taca_jax.text.clip import CLIPConfig, CLIPTextEncoder
from taca_jax.text.encoders import FluxText, SD3Text
from taca_jax.text.t5 import T5Config, T5Encoder
from taca_jax.text.tokenizers import FolderTokenizer, JoinedTokenizer, Tokenizer, load_tokenizer
from taca_jax.weights.pipeline_folders import Part, Parts

SUFFIXES = ("", "_2", "_3")

Load = Callable[[Part], Any]
"""Reads a model."""


def load_flux_text(
    parts: Parts, load: Load, *, txt_dim: int, pooled_dim: int
) -> tuple[T5Encoder | FluxText, Tokenizer] | None:
    """What reads the prompts of a FLUX pipeline, or None where a part of it is left out.

    That is CLIP and T5, or a T5 alone where the transformer's pooled embedding is as wide as T5:
    only small models trained that way are. The settings' tokenizer is T5's, by name or folder
    (within the pipeline's or elsewhere), or None for the folder of its number.

    Raises UserError where parts are damaged, of another width than the transformer reads
    (`txt_dim`, `pooled_dim`), or too many, and where a tokenizer is not there.
    """
    clips, t5s = _found(parts, CLIPConfig), _found(parts, T5Config)
    _at_most(parts, "CLIP", clips, 1)
    _at_most(parts, "T5", t5s, 1)
    if not t5s:
        return None
    ((t5_suffix, t5),) = t5s.items()
    if not clips and t5.config.dim != pooled_dim:
        return None
    _check_width(t5, txt_dim)
    t5_tokenizer = _t5_tokenizer(parts, t5_suffix)
    if not clips:
        return load(t5), t5_tokenizer
    ((clip_suffix, clip),) = clips.items()
    _check_width(clip, pooled_dim)
    clip_tokenizer = _own_tokenizer(parts, clip_suffix, clip.config.max_tokens)
    return FluxText(load(clip), load(t5)), JoinedTokenizer((clip_tokenizer, t5_tokenizer))


def load_sd3_text(
    parts: Parts, load: Load, *, txt_dim: int, pooled_dim: int
) -> tuple[SD3Text, Tokenizer] | None:
    """What reads the prompts of a Stable Diffusion 3 pipeline, or None without both CLIPs.

    CLIP-L is its first CLIP and CLIP-bigG the second; a T5 may be left out.
    CLIP-bigG's tokenizer pads with "!", which the files of its `tokenizer_2/` say; a vocabulary
    and merges alone would pad with the end token, as they do in transformers.

    Raises UserError as `load_flux_text` and `SD3Text` do.
    """
    clips, t5s = _found(parts, CLIPConfig), _found(parts, T5Config)
    _at_most(parts, "CLIP", clips, 2)
    _at_most(parts, "T5", t5s, 1)
    if len(clips) < 2:
        return None
    for t5 in t5s.values():
        _check_width(t5, txt_dim)
    pooled = sum(clip.config.projection_dim or 0 for clip in clips.values())
    if pooled != pooled_dim:
        raise UserError(
            f"the CLIPs of {parts.where} make a pooled embedding of {pooled}, the transformer "
            f"reads {pooled_dim}; they are of another model"
        )
    tokenizers: list[Tokenizer] = [
        _own_tokenizer(parts, suffix, clip.config.max_tokens) for suffix, clip in clips.items()
    ]
    tokenizers += [_t5_tokenizer(parts, suffix) for suffix in t5s]
    first, second = (load(clip) for clip in clips.values())
    t5 = next((load(t5) for t5 in t5s.values()), None)
    length = parts.settings.text_length
    encoder = SD3Text(first, second, t5, width=txt_dim, t5_length=length)
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


def _found(parts: Parts, kind: type) -> dict[str, Part]:
    """The text encoders of a kind, by the suffix of their names."""
    found = {}
    for suffix in SUFFIXES:
        part = parts.models.get(f"text_encoder{suffix}")
        if part is None:
            continue
        if not isinstance(part.config, CLIPConfig | T5Config):
            raise UserError(
                f"{part.where} holds no text encoder but a {type(part.config).__name__}"
            )
        if isinstance(part.config, kind):
            found[suffix] = part
    return found


def _at_most(parts: Parts, name: str, found: Mapping[str, Part], most: int) -> None:
    if len(found) > most:
        names = ", ".join(f"text_encoder{suffix}" for suffix in found)
        raise UserError(
            f"{parts.where} has {len(found)} {name} encoders ({names}); expected {most}"
        )


def _check_width(part: Part, expected: int) -> None:
    if part.config.dim != expected:
        raise UserError(
            f"{part.where} is {part.config.dim} wide, the transformer reads {expected}; it is of "
            "another model"
        )


def _own_tokenizer(parts: Parts, suffix: str, length: int) -> Tokenizer:
    own = parts.tokenizers / f"tokenizer{suffix}"
    if not own.is_dir():
        raise UserError(
            f"{own} is not there, which text_encoder{suffix} reads prompts with; copy that folder "
            "from the original"
        )
    return load_tokenizer(str(own), length)


def _t5_tokenizer(parts: Parts, suffix: str) -> Tokenizer:
    name, length = parts.settings.tokenizer, parts.settings.text_length
    if name is None:
        return _own_tokenizer(parts, suffix, length)
    # Converted pipelines bring their tokenizer's folder with them.
    inside = parts.tokenizers / name
    return load_tokenizer(str(inside) if inside.is_dir() else name, length)
