"""Writes a cache's shards, and the embeddings of the empty caption."""

from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypedDict

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from taca_jax.data.cache.files import EMPTY, INDEX, RECORDS, SHARDS
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file, whole_folder
from taca_jax.storage.places import Place

SHARD_BYTES = 2**30
"""A shard is full when it has so many bytes."""

_WRITE = "group_size:1,uncompressed"


class Caption(TypedDict):
    """The embeddings of one caption: of its tokens, [t, k], and pooled, [p]."""

    txt: np.ndarray
    pooled: np.ndarray


class CacheWriter:
    """Writes one process's shards of a cache. A context manager, which ends the last shard."""

    def __init__(self, folder: Place, prefix: str, *, shard_bytes: int = SHARD_BYTES):
        """folder: of the cache. prefix: of the shards' names, a different one in each process."""
        self._folder = folder / SHARDS
        self._prefix = prefix
        self._shard_bytes = shard_bytes
        self._rows: list[tuple[int, int, int, bytes]] = []
        self._bytes = self._records = 0
        self._number = 0
        self._open: Any = None
        self._writer: Any = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open is None:
            return
        if kind is None:
            self.finish()
            return
        with suppress(RuntimeError):  # it may be the disk that failed
            self._writer.close()
        self._open.__exit__(kind, error, traceback)

    def add(
        self,
        example: int,
        name: str,
        latents: Sequence[np.ndarray],
        captions: Sequence[Caption],
    ) -> None:
        """Writes example `example` of the source, whose name is `name`.

        latents: [h, w, c] each, the mean and, if the cache has it, the log variance. Raises
        UserError where the example cannot be written.
        """
        if self._open is None:
            self._start()
        parts = [latents, *((each["txt"], each["pooled"]) for each in captions)]
        records = [b"".join(array.tobytes() for array in part) for part in parts]
        try:
            for record in records:
                self._writer.write(record)
        except RuntimeError as error:  # how ArrayRecord reports an error of the system
            raise self._refused(error) from error
        self._rows.append((example, self._records, len(captions), name.encode()))
        self._records += len(records)
        self._bytes += sum(map(len, records))
        if self._bytes >= self._shard_bytes:
            self.finish()

    def finish(self) -> None:
        """Ends the shard, which is part of the cache from then on."""
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._refused(error) from error
        width = max(1, *(len(row[-1]) for row in self._rows))
        kind = [("example", "<i8"), ("record", "<i8"), ("captions", "<i4"), ("name", f"S{width}")]
        with (self._made / INDEX).open("wb") as file:
            np.save(file, np.array(self._rows, kind))
        opened, self._open = self._open, None
        opened.__exit__(None, None, None)

    def _start(self) -> None:
        # In a bucket there may be a shard without its index: one that was never whole.
        while (self._folder / f"{self._prefix}{self._number:06}" / INDEX).exists():
            self._number += 1
        path = self._folder / f"{self._prefix}{self._number:06}"
        self._open = whole_folder(path, INDEX)
        self._made = self._open.__enter__()
        self._writer = array_record_module.ArrayRecordWriter(str(self._made / RECORDS), _WRITE)
        self._rows, self._bytes, self._records = [], 0, 0

    def _refused(self, error: Exception) -> UserError:
        reason = str(error).partition(";")[0]
        return UserError(f"{self._folder} cannot be written ({reason}); make room there")


def write_empty_caption(folder: Place, caption: Caption) -> None:
    """Writes the embeddings of the empty caption, which replaces dropped ones."""
    with whole_file(folder / EMPTY) as file:
        file.write_bytes(caption["txt"].tobytes() + caption["pooled"].tobytes())
