"""Captions to token ids, and token ids to what the transformer is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from taca_jax.data.shapes_captions import VOCABULARY
from taca_jax.errors import UserError
from taca_jax.models.t5 import T5Encoder
from taca_jax.sampling import Conditioning


class Tokenizer(Protocol):
    """Captions to int32 ids `[n, length]`: cut or padded with `pad_id`, ended by the end token."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def __call__(self, captions: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class WordTokenizer:
    """One token per word of the shapes data; a caption that does not fit is an error.

    Raises UserError naming a word that the vocabulary lacks.
    """

    length: int
    vocab_size: int = len(VOCABULARY)
    pad_id: int = VOCABULARY.index("<pad>")

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        ids = np.full((len(captions), self.length), self.pad_id, np.int32)
        for row, caption in zip(ids, captions, strict=True):
            words = [*caption.lower().split(), "</s>"]
            if len(words) > self.length:
                raise UserError(
                    f"{caption!r} takes {len(words)} tokens; this model reads {self.length}"
                )
            for column, word in enumerate(words):
                if word not in _WORD_IDS:
                    known = " ".join(w for w in VOCABULARY if not w.startswith("<"))
                    raise UserError(
                        f"the word {word!r} is unknown to this model; it knows: {known}"
                    )
                row[column] = _WORD_IDS[word]
        return ids


_WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as tokens, with ByT5's ids: 0 pads, 1 ends, 2 is unused, byte + 3."""

    length: int
    vocab_size: int = 256 + 3
    pad_id: int = 0

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        ids = np.full((len(captions), self.length), self.pad_id, np.int32)
        for row, caption in zip(ids, captions, strict=True):
            text = caption.encode(errors="replace")  # a terminal may pass on undecodable bytes
            tokens = [byte + 3 for byte in text[: self.length - 1]] + [1]
            row[: len(tokens)] = tokens
        return ids


_PAD = "<pad>"


class FolderTokenizer:
    """A Hugging Face tokenizer from a local folder."""

    def __init__(self, path: str | Path, length: int):
        from transformers import AutoTokenizer  # slow to import, and needed only here

        if not Path(path).is_dir():
            raise UserError(
                f"text.tokenizer {str(path)!r} is neither shapes, bytes nor a folder with a "
                "tokenizer"
            )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the library raises almost anything for a damaged file
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(f"no tokenizer could be read from {path}: {reason}") from error
        if self._tokenizer.pad_token_id is None and _PAD in self._tokenizer.get_vocab():
            self._tokenizer.pad_token = _PAD  # a tokenizer.json alone does not say what pads
        if self._tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer in {path} has no padding token; T5's has one")
        self.length = length
        self.vocab_size = len(self._tokenizer)
        self.pad_id = self._tokenizer.pad_token_id

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="np",
        )
        return encoded["input_ids"].astype(np.int32)


def load_tokenizer(name: str, length: int) -> Tokenizer:
    """The tokenizer called `shapes` or `bytes`, or that of a local folder.

    Raises UserError when the folder is not there or holds none.
    """
    if name == "shapes":
        return WordTokenizer(length)
    if name == "bytes":
        return ByteTokenizer(length)
    return FolderTokenizer(name, length)


def encode(encoder: T5Encoder, tokens: Int[Array, "b t"], pad_id: int) -> Conditioning:
    """Token embeddings, and their mean over what is not padding as the pooled embedding.

    As in FLUX, padding is not masked: every text token takes part in the joint attention.
    """
    txt = encoder(tokens).astype(jnp.float32)
    return Conditioning(txt=txt, pooled=_mean(txt, tokens != pad_id))


def _mean(txt: Float[Array, "b t k"], keep: jax.Array) -> Float[Array, "b k"]:
    weight = keep.astype(txt.dtype)[..., None]
    return (txt * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
