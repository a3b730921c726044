"""The text encoders and tokenizers of a pipeline.

A pipeline has some of the folders `text_encoder/`, `text_encoder_2/` and `text_encoder_3/`; each
one's config says which kind of model it holds. Its tokenizer is the folder `tokenizer/`,
`tokenizer_2/` or `tokenizer_3/` of the same number, as in diffusers; for T5 the settings may name a
tokenizer instead.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.nn.kinds import kind_of
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.encoders import FOLDERS, TextEncoder, TextReading
from taca_jax.text.tokenizers import FolderTokenizer, JoinedTokenizer, Tokenizer, load_tokenizer
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.original_pipelines import TOKENIZERS
from taca_jax.weights.pipeline_folders import StoredPipeline

_TOKENIZER_OF: dict[str, str] = dict(zip(FOLDERS, TOKENIZERS, strict=True))


def load_text(
    stored: StoredPipeline, reading: TextReading, options: LoadOptions
) -> tuple[TextEncoder, Tokenizer]:
    """The text encoders of a pipeline and their tokenizers, joined as `reading` says.

    Raises UserError as `load_tokenizers` and `load_encoders` do.
    """
    tokenizer = load_tokenizers(stored, reading)
    return load_encoders(stored, reading, options, tokenizer), tokenizer


def lacks_encoders(family: Family) -> UserError:
    """What is said of a pipeline that is to read prompts and cannot."""
    return UserError(
        f"this pipeline lacks a text encoder ({family.text_encoders}); add text_encoder/, "
        "text_encoder_2/, ... and their tokenizers beside its transformer, or from Python give "
        "prompt_embeds and pooled_prompt_embeds"
    )


def load_tokenizers(stored: StoredPipeline, reading: TextReading) -> Tokenizer:
    """The tokenizers of a pipeline, joined. Raises UserError where one is missing."""
    named = find_tokenizers(stored, reading)  # of several none is read if one is missing
    tokenizers = tuple(load_tokenizer(*each, reading.frame) for each in named)
    return tokenizers[0] if len(tokenizers) == 1 else JoinedTokenizer(tokenizers)


def find_tokenizers(stored: StoredPipeline, reading: TextReading) -> list[tuple[str, int]]:
    """The name or folder of each tokenizer, and how many tokens of it are read. Raises UserError
    where a folder is missing."""
    return [_tokenizer(stored, folder) for folder in reading.folders]


def load_encoders(
    stored: StoredPipeline, reading: TextReading, options: LoadOptions, tokenizer: Tokenizer
) -> TextEncoder:
    """The text encoders of a pipeline, joined as `reading` says.

    `options.quantize` acts on those encoders that can be quantised. Raises UserError where encoders
    are damaged or do not fit the transformer.
    """
    models = [stored.models[folder] for folder in reading.folders]
    encoders = [model.load(encoder_options(model.config, options)) for model in models]
    return reading.join(encoders, tokenizer.pad_id)


def encoder_options(config: Any, options: LoadOptions) -> LoadOptions:
    """`options` for the text encoder with this config, not quantised where its kind cannot be."""
    can_be = kind_of(config).quantized is not None
    return replace(options, quantize=options.quantize if can_be else "none")


def _tokenizer(stored: StoredPipeline, folder: str) -> tuple[str, int]:
    config, settings = stored.models[folder].config, stored.settings
    if isinstance(config, CLIPConfig):
        return _own_tokenizer(stored, folder, config.max_tokens)
    if settings.tokenizer is None:
        return _own_tokenizer(stored, folder, settings.text_length)
    # A converted pipeline contains its tokenizer's folder.
    inside = stored.tokenizers / settings.tokenizer
    name = str(inside) if inside.is_dir() else settings.tokenizer
    return name, settings.text_length


def _own_tokenizer(stored: StoredPipeline, folder: str, length: int) -> tuple[str, int]:
    own = stored.tokenizers / _TOKENIZER_OF[folder]
    if not own.is_dir():
        raise UserError(
            f"{own} is not there; it is the tokenizer of {folder}: copy that folder of the "
            "model's page there, or give tokenizers=, a folder that has it or a model of the hub"
        )
    return str(own), length


def encoders_by_folder(encoder: TextEncoder | None) -> dict[str, nnx.Module]:
    """The models of a text encoder, by the names of their folders in a pipeline folder."""
    return {} if encoder is None else dict(zip(FOLDERS, encoder.encoders, strict=False))


def save_tokenizers(folder: Path, tokenizer: Tokenizer | None) -> bool:
    """Writes the tokenizers that consist of files into the folder.

    Returns whether the last one, T5's, was among them.
    """
    parts = tokenizer.parts if isinstance(tokenizer, JoinedTokenizer) else (tokenizer,)
    for name, part in zip(TOKENIZERS, parts, strict=False):
        if isinstance(part, FolderTokenizer):
            part.save(folder / name)
    return isinstance(parts[-1], FolderTokenizer)
