"""The text encoders and tokenizers of a pipeline.

`text_encoder`, `text_encoder_2` and `text_encoder_3`, those that are there, are models of any
kind: each one's config says which. The tokenizer of each is the folder `tokenizer/`,
`tokenizer_2/`, `tokenizer_3/` of the same number, as in diffusers; a T5's may be named instead.
"""

from dataclasses import replace
from pathlib import Path

from flax import nnx

from taca_jax.errors import UserError
from taca_jax.nn.kinds import kind_of
from taca_jax.nn.low_bit import Quantization
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.encoders import FOLDERS, TextEncoder, TextReading
from taca_jax.text.tokenizers import FolderTokenizer, JoinedTokenizer, Tokenizer, load_tokenizer
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.original_pipelines import TOKENIZERS
from taca_jax.weights.pipeline_folders import StoredPipeline

_TOKENIZER_OF: dict[str, str] = dict(zip(FOLDERS, TOKENIZERS, strict=True))


def load_text(
    stored: StoredPipeline,
    reading: TextReading,
    options: LoadOptions,
    quantize: Quantization = "none",
) -> tuple[TextEncoder, Tokenizer]:
    """What reads the prompts of a pipeline, in its way of `reading` them.

    `quantize` is what the kernels of those encoders that can be quantised are kept in. Raises
    UserError where encoders are damaged or do not fit the transformer, and where a tokenizer is not
    there.
    """
    tokenizer = load_tokenizers(stored, reading.folders)
    encoders = []
    for folder in reading.folders:
        model = stored.models[folder]
        can_be = kind_of(model.config).quantized is not None
        encoders.append(model.load(replace(options, quantize=quantize if can_be else "none")))
    return reading.join(encoders, tokenizer.pad_id), tokenizer


def load_tokenizers(stored: StoredPipeline, folders: tuple[str, ...]) -> Tokenizer:
    """The tokenizers of the text encoders in these folders, as one. Raises UserError where one is
    not there."""
    found = tuple(_tokenizer(stored, folder) for folder in folders)
    return found[0] if len(found) == 1 else JoinedTokenizer(found)


def _tokenizer(stored: StoredPipeline, folder: str) -> Tokenizer:
    config, settings = stored.models[folder].config, stored.settings
    if isinstance(config, CLIPConfig):
        return _own_tokenizer(stored, folder, config.max_tokens)
    if settings.tokenizer is None:
        return _own_tokenizer(stored, folder, settings.text_length)
    # Converted pipelines bring their tokenizer's folder with them.
    inside = stored.tokenizers / settings.tokenizer
    name = str(inside) if inside.is_dir() else settings.tokenizer
    return load_tokenizer(name, settings.text_length)


def _own_tokenizer(stored: StoredPipeline, folder: str, length: int) -> Tokenizer:
    own = stored.tokenizers / _TOKENIZER_OF[folder]
    if not own.is_dir():
        raise UserError(
            f"{own} is not there, which {folder} reads prompts with; copy that folder from the "
            "original"
        )
    return load_tokenizer(str(own), length)


def encoders_by_folder(encoder: TextEncoder | None) -> dict[str, nnx.Module]:
    """The models of a text encoder by the name of their folders in a pipeline's."""
    return {} if encoder is None else dict(zip(FOLDERS, encoder.encoders, strict=False))


def save_tokenizers(folder: Path, tokenizer: Tokenizer | None) -> bool:
    """Writes the tokenizers that are files into the folder; whether the last, T5's, was one."""
    parts = tokenizer.parts if isinstance(tokenizer, JoinedTokenizer) else (tokenizer,)
    for name, part in zip(TOKENIZERS, parts, strict=False):
        if isinstance(part, FolderTokenizer):
            part.save(folder / name)
    return isinstance(parts[-1], FolderTokenizer)
