"""What a source of examples is, and what all sources of pictures of any size have in common."""

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from taca_jax.data.sources.bad_examples import BadExampleError, BadExamples, NoCaptionError
from taca_jax.data.sources.captions import GivenCaption
from taca_jax.data.sources.decoding import FORMATS, picture_size, read_picture
from taca_jax.data.sources.stored_scans import is_refusal, scan_once
from taca_jax.data.threads import usable_cores

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""The suffixes of files that are taken for pictures."""

UNKNOWN_SIZE = (0, 0)
"""Stands for the size of a picture whose header cannot be read."""

_SIZES_VERSION = 1
"""Of the scan for sizes: to be raised when it finds something else in the same files."""

_SIZES_PER_TASK = 256


class Example(TypedDict):
    """A picture, uint8 [height, width, 3], RGB; its caption, or several to draw from; its name;
    of generated shapes, if asked for, the labels of its patches."""

    image: np.ndarray
    caption: str | Sequence[str]
    id: str
    labels: NotRequired[np.ndarray]


class Source(Protocol):
    """Examples by index. `[i]` raises BadExampleError for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def captions_of(example: Example) -> Sequence[str]:
    """All captions of an example."""
    caption = example["caption"]
    return (caption,) if isinstance(caption, str) else caption


class PictureSource(ABC):
    """Pictures of any size with captions, by index, each cropped and resized as it is read.

    `bad` counts the examples that cannot be used and names each in the log.
    """

    bad: BadExamples

    def __init__(self, resolution: int, given: GivenCaption = GivenCaption()):  # noqa: B008
        """`source[i]` gives squares of `resolution` pixels a side. given: the caption that is given
        for all pictures."""
        self._resolution = resolution
        self._given = given

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Where example `index` is, for messages."""

    @abstractmethod
    def id(self, index: int) -> str:
        """The name of example `index` within its source."""

    @abstractmethod
    def stamp(self) -> bytes:
        """Bytes that change when any of the source's files does."""

    @abstractmethod
    def _caption(self, index: int) -> str | Sequence[str]:
        """The example's own caption, or several. Raises NoCaptionError where there is none."""

    @abstractmethod
    def _file(self, index: int) -> Path | io.BytesIO:
        """The picture's file. Raises BadExampleError where it cannot be read."""

    def _head(self, index: int) -> Path | io.BytesIO:
        """The beginning of the picture's file, which most often holds the whole header."""
        return self._file(index)

    def __getitem__(self, index: int) -> Example:
        return self.read(index, (self._resolution, self._resolution))

    def read(self, index: int, size: tuple[int, int]) -> Example:
        """Example `index`, its picture cropped and resized to (height, width) in pixels.

        Raises BadExampleError if it cannot be read, and UserError if that makes too many.
        """
        try:
            caption = self._given.of(self._own_caption(index))
            image = read_picture(self._file(index), size)
        except BadExampleError as error:
            self.bad.add_bad(index, self.name(index), str(error))
            raise
        self.bad.add_good(index)
        return {"image": image, "caption": caption, "id": self.id(index)}

    def _own_caption(self, index: int) -> str | Sequence[str]:
        try:
            return self._caption(index)
        except NoCaptionError:
            if self._given.default is None:
                raise
            return self._given.default

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: height and width in pixels of each picture; UNKNOWN_SIZE for bad ones.

        The headers of all pictures are read once, and again when a file has changed.
        """
        return scan_once("sizes", (_SIZES_VERSION, FORMATS), self.stamp(), self._scan_sizes)

    def _scan_sizes(self) -> tuple[np.ndarray, bool]:
        """The sizes, and whether the system let all files be read."""
        refused = threading.Event()

        def part(start: int) -> np.ndarray:
            indices = range(start, min(start + _SIZES_PER_TASK, len(self)))
            sizes = [self._size(index, refused) for index in indices]
            return np.array(sizes, np.int32).reshape(-1, 2)

        with ThreadPoolExecutor(usable_cores()) as pool:
            parts = list(pool.map(part, range(0, len(self), _SIZES_PER_TASK)))
        return np.concatenate(parts or [np.zeros((0, 2), np.int32)]), not refused.is_set()

    def _size(self, index: int, refused: threading.Event) -> tuple[int, int]:
        """(height, width), or UNKNOWN_SIZE; bad pictures are counted when they are read whole."""
        for file in (self._head, self._file):
            try:
                return picture_size(file(index))
            except BadExampleError as error:
                if is_refusal(error.__cause__):
                    refused.set()
        return UNKNOWN_SIZE


def printable(path: str) -> str:
    """A path as text that can be encoded, whatever bytes its file's name has."""
    return os.fsencode(path).decode("utf-8", "replace")
