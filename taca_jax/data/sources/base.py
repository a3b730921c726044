"""What a source of examples is, and what all sources of pictures of any size share."""

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from taca_jax.data.sources.bad_examples import BadExampleError, BadExamples
from taca_jax.data.sources.decoding import picture_size, read_picture
from taca_jax.data.sources.scans import kept_array, was_refused

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""What names of pictures end with."""

UNKNOWN = (0, 0)
"""The size of a picture whose header cannot be read."""

CAPTION_KEYS = ("caption", "captions", "text", "name")
_SIZES_AT_ONCE = 256


class Example(TypedDict):
    """A picture, uint8 [height, width, 3], RGB; its caption, or several to draw from; its name."""

    image: np.ndarray
    caption: str | Sequence[str]
    id: str


class Source(Protocol):
    """Examples by index. `[i]` raises BadExampleError for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class PictureSource(ABC):
    """Pictures of any size with captions, by index, each brought to the size that is asked for.

    What cannot be used is counted in `bad`, and logged once.
    """

    bad: BadExamples

    def __init__(self, resolution: int):
        """`source[i]` gives squares of `resolution` pixels a side."""
        self._resolution = resolution

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Where a picture is, for messages."""

    @abstractmethod
    def id(self, index: int) -> str:
        """What a picture is called, within its source."""

    @abstractmethod
    def stamp(self) -> bytes:
        """Bytes that change when any of the files do."""

    @abstractmethod
    def _caption(self, index: int) -> str | Sequence[str]:
        """Raises BadExampleError where there is none."""

    @abstractmethod
    def _file(self, index: int) -> Path | io.BytesIO:
        """The picture's file. Raises BadExampleError where it is not there."""

    def _head(self, index: int) -> Path | io.BytesIO:
        """At least the picture's header."""
        return self._file(index)

    def __getitem__(self, index: int) -> Example:
        return self.read(index, (self._resolution, self._resolution))

    def read(self, index: int, size: tuple[int, int]) -> Example:
        """Example `index`, its picture brought to (height, width).

        Raises BadExampleError for one that cannot be read, and UserError for too many of them.
        """
        try:
            caption = self._caption(index)
            image = read_picture(self._file(index), size)
        except BadExampleError as error:
            self.bad.bad(index, self.name(index), str(error))
            raise
        self.bad.good(index)
        return {"image": image, "caption": caption, "id": self.id(index)}

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: height and width of each picture, of the header; UNKNOWN where it is bad.

        Headers are read once and then kept (`kept_array`), as long as the files do not change.
        """
        return kept_array("sizes", self.stamp(), self._read_sizes)

    def _read_sizes(self) -> tuple[np.ndarray, bool]:
        """The sizes, and whether the system refused none of the files."""
        refused = threading.Event()

        def some(start: int) -> np.ndarray:
            indices = range(start, min(start + _SIZES_AT_ONCE, len(self)))
            return np.array([self._size(index, refused) for index in indices], np.int32).reshape(
                -1, 2
            )

        with ThreadPoolExecutor(cores()) as pool:
            parts = list(pool.map(some, range(0, len(self), _SIZES_AT_ONCE)))
        return np.concatenate(parts or [np.zeros((0, 2), np.int32)]), not refused.is_set()

    def _size(self, index: int, refused: threading.Event) -> tuple[int, int]:
        for file in (self._head, self._file):
            try:
                return picture_size(file(index))
            except BadExampleError as error:
                if was_refused(error.__cause__):
                    refused.set()
                continue  # the header may be longer than what was read; bad ones are named later
        return UNKNOWN


def captions_of(record: Any) -> str | tuple[str, ...] | None:
    """The caption in a JSON object, or several where it holds a list; None where it holds none.

    Empty ones among several are left out; one alone is given as it is, stripped.
    """
    if not isinstance(record, dict):
        return None
    found = next((record[key] for key in CAPTION_KEYS if key in record), None)
    if isinstance(found, str):
        return found.strip()
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        return None
    captions = tuple(each.strip() for each in found if each.strip())
    return captions if len(captions) > 1 else "".join(captions)


def text_of(content: bytes, name: str) -> str:
    """The caption that a .txt holds. Raises BadExampleError for one that is empty or not UTF-8."""
    try:
        caption = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadExampleError(f"{name} is not UTF-8") from error
    if not caption:
        raise BadExampleError(f"{name} is empty")
    return caption


def printable(path: str) -> str:
    """A path that can be written as UTF-8, whatever bytes its file's name has."""
    return os.fsencode(path).decode("utf-8", "replace")


def cores() -> int:
    """How many threads can run at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
