"""Tokenizers: captions to token ids."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from taca_jax.data.shapes.captions import VOCABULARY
from taca_jax.errors import UserError
from taca_jax.hub.ids import HubId, Selection, hint, hub_id, names_in

LOGGER = logging.getLogger(__name__)


Span = tuple[int, int]
Frame = tuple[str, str]
"""What stands before and after each caption that is read, such as a chat template."""


class Tokenizer(Protocol):
    """Captions to int32 ids `[n, length]`: truncated or padded with `pad_id`, with an end token.

    cuts: one message for each caption that is truncated, with the text that is lost.
    spans: (start, stop) of the characters that each id of a caption stands for; (0, 0) for an id
    that stands for none, such as padding.
    """

    @property
    def length(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def __call__(self, captions: Sequence[str]) -> np.ndarray: ...
    def cuts(self, captions: Sequence[str]) -> list[str]: ...
    def spans(self, caption: str) -> list[Span]: ...


@dataclass(frozen=True)
class WordTokenizer:
    """One token per word of the shapes data.

    Raises UserError for a caption that is too long, and for a word that the vocabulary lacks.
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

    def cuts(self, captions: Sequence[str]) -> list[str]:
        del captions
        return []

    def spans(self, caption: str) -> list[Span]:
        return _filled([word.span() for word in re.finditer(r"\S+", caption)], self.length)


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
            text = _valid(caption).encode()
            tokens = [byte + 3 for byte in text[: self.length - 1]] + [1]
            row[: len(tokens)] = tokens
        return ids

    def cuts(self, captions: Sequence[str]) -> list[str]:
        rests = [_valid(caption).encode()[self.length - 1 :] for caption in captions]
        texts = [rest.decode(errors="ignore") for rest in rests]
        return [
            _cut_line("this model", self.length, caption, text, len(rest))
            for caption, rest, text in zip(captions, rests, texts, strict=True)
            if rest
        ]

    def spans(self, caption: str) -> list[Span]:
        of_bytes = [(i, i + 1) for i, char in enumerate(_valid(caption)) for _ in char.encode()]
        return _filled(of_bytes[: self.length - 1], self.length)


_PAD = "<pad>"
_BARE_CLIP = ("vocab.json", "merges.txt")
_SAYS_ITS_CLASS = ("tokenizer.json", "tokenizer_config.json")
_ENDS = (".json", ".txt", ".model", ".jinja")
"""Of the names of a tokenizer's files."""


class FolderTokenizer:
    """A Hugging Face tokenizer from a local folder, or by its hub id (`google/t5-v1_1-xxl`, or
    `owner/repo:tokenizer_2`).

    For CLIP, vocab.json and merges.txt are enough. A caption is read within its `frame`, and is cut
    with it. Raises UserError if there is no tokenizer, it cannot be read, or the hub does not give
    it.
    """

    def __init__(self, path: str | Path, length: int, frame: Frame = ("", "")):
        self._tokenizer = _read_tokenizer(path)
        if self._tokenizer.pad_token_id is None and _PAD in self._tokenizer.get_vocab():
            self._tokenizer.pad_token = _PAD  # a tokenizer.json alone does not say which token pads
        if self._tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer in {path} has no padding token; T5's has one")
        self.where = f"the tokenizer in {path}"
        self.length = length
        self.frame = frame
        self.vocab_size: int = len(self._tokenizer)
        self.pad_id: int = self._tokenizer.pad_token_id

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer(
            [self._framed(caption) for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="np",
        )
        return encoded["input_ids"].astype(np.int32)

    def cuts(self, captions: Sequence[str]) -> list[str]:
        if any(self.frame):
            return [line for caption in captions for line in self._cut_in_frame(caption)]
        valid = [_valid(caption) for caption in captions]
        lines = []
        # verbose=False: some tokenizers warn about texts longer than their model reads.
        for caption, ids in zip(
            valid, self._tokenizer(valid, verbose=False).input_ids, strict=True
        ):
            if len(ids) > self.length:
                rest = ids[self.length - 1 : -1]  # the last id is the end token
                text = self._tokenizer.decode(rest, skip_special_tokens=True)
                lines.append(_cut_line(self.where, self.length, caption, text, len(rest)))
        return lines

    def spans(self, caption: str) -> list[Span]:
        found = self._spans_of_ids(caption, truncation=True, max_length=self.length)
        return _filled(found, self.length)

    def _framed(self, caption: str) -> str:
        before, after = self.frame
        return f"{before}{_valid(caption)}{after}"

    def _spans_of_ids(self, caption: str, **options: Any) -> list[Span]:
        # transformers 5 has tokenizers of this kind only, which know where their ids come from.
        encoded = self._tokenizer(
            self._framed(caption), return_offsets_mapping=True, verbose=False, **options
        )
        start, end = len(self.frame[0]), len(_valid(caption))
        within = (
            (max(first - start, 0), min(last - start, end))
            for first, last in encoded.offset_mapping
        )
        return [(first, last) if first < last else (0, 0) for first, last in within]

    def _cut_in_frame(self, caption: str) -> list[str]:
        rest = [span for span in self._spans_of_ids(caption)[self.length :] if span != (0, 0)]
        if not rest:
            return []
        text = _valid(caption)[rest[0][0] :]
        return [_cut_line(self.where, self.length, caption, text, len(rest))]

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files to a folder that FolderTokenizer can read."""
        self._tokenizer.save_pretrained(str(folder))


@dataclass(frozen=True)
class JoinedTokenizer:
    """Several tokenizers' ids of the same captions, concatenated; `pad_id` is the last one's."""

    parts: tuple[Tokenizer, ...]

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    @property
    def pad_id(self) -> int:
        return self.parts[-1].pad_id

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        return np.concatenate([part(captions) for part in self.parts], axis=1)

    def cuts(self, captions: Sequence[str]) -> list[str]:
        return [line for part in self.parts for line in part.cuts(captions)]

    def spans(self, caption: str) -> list[Span]:
        return [span for part in self.parts for span in part.spans(caption)]


def load_tokenizer(
    name: str, length: int, frame: Frame = ("", "")
) -> WordTokenizer | ByteTokenizer | FolderTokenizer:
    """The tokenizer called `shapes` or `bytes`, or that of a local folder or a hub id, which alone
    reads captions within a frame.

    Raises UserError if there is none.
    """
    if name == "shapes":
        return WordTokenizer(length)
    if name == "bytes":
        return ByteTokenizer(length)
    return FolderTokenizer(name, length, frame)


def announce_cuts(tokenizer: Tokenizer, captions: Sequence[str]) -> None:
    """Logs a one-line warning for each caption that is truncated, with the text that is lost; of a
    caption that is there several times only one."""
    for line in dict.fromkeys(tokenizer.cuts(captions)):
        LOGGER.warning("warning: %s", line)


def tokenizer_files(found: HubId, names: Sequence[str]) -> Selection:
    """The files of a tokenizer, and of the config beside it, which may say what it is."""
    inside = [name for name in names_in(found, names, found.inside) if "/" not in name]
    chosen = [name for name in inside if name.endswith(_ENDS) and ".index." not in name]
    folder = f"{found.inside}/" if found.inside else ""
    return Selection(tuple(folder + name for name in chosen), found.inside)


def _read_tokenizer(path: str | Path) -> Any:
    folder = Path(path)
    if not folder.is_dir():
        if (found := hub_id(str(path))) is None:
            raise UserError(
                f"text.tokenizer {str(path)!r} is neither shapes, bytes nor a folder with a "
                f"tokenizer; {hint(path)}"
            )
        from taca_jax.hub.fetching import fetch  # slow to import, too

        folder = fetch(found, tokenizer_files)
    files = tuple(sorted(_stamp(file) for file in folder.iterdir() if file.is_file()))
    try:
        return _reader(folder.absolute(), files)
    except Exception as error:  # the library raises almost anything for a damaged file
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"no tokenizer could be read from {path}: {reason}") from error


_Stamp = tuple[str, int, int]
"""A file's name, size and time."""


def _stamp(file: Path) -> _Stamp:
    found = file.stat()
    return file.name, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=8)
def _reader(folder: Path, files: tuple[_Stamp, ...]) -> Any:
    """Read once, for the checks before a run and for the run itself; again if its files change."""
    del files
    from transformers import AutoTokenizer, CLIPTokenizer  # slow to import, and needed only here

    bare_clip = all((folder / name).is_file() for name in _BARE_CLIP) and not any(
        (folder / name).is_file() for name in _SAYS_ITS_CLASS
    )
    reader = CLIPTokenizer if bare_clip else AutoTokenizer
    return reader.from_pretrained(str(folder), local_files_only=True)


def _valid(caption: str) -> str:
    """The caption without characters that UTF-8 cannot encode, which a terminal may pass on."""
    return caption.encode(errors="replace").decode()


def _filled(spans: list[Span], length: int) -> list[Span]:
    return spans + [(0, 0)] * (length - len(spans))


_SHOWN = 40, 400
"""The most characters of a caption, and of the text cut from it, in a warning."""


def _cut_line(where: str, length: int, caption: str, cut: str, tokens: int) -> str:
    named, rest = (
        text if len(text) <= shown else f"{text[:shown]}..."
        for text, shown in zip(
            (" ".join(caption.split()), " ".join(cut.split())), _SHOWN, strict=True
        )
    )
    return f'{where} reads {length} tokens; {tokens} more of "{named}" are cut: "{rest}"'
