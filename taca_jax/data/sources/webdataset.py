"""Captioned pictures in tar files in WebDataset's layout.

The files of a sample follow each other, and their names are the same up to the first dot.
"""

import io
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from taca_jax.data.sources.bad_examples import BadExampleError, BadExamples, NoCaptionError
from taca_jax.data.sources.captions import GivenCaption, caption_from_json, caption_from_text
from taca_jax.data.sources.source import PICTURE_SUFFIXES, PictureSource, printable
from taca_jax.data.sources.stored_scans import scan_once, stamps_of
from taca_jax.data.sources.tars import Broken, walk
from taca_jax.errors import UserError
from taca_jax.storage.places import Place, in_bucket, read_bytes

Captions = str | Sequence[str]
FurtherCaptions = Callable[[Place], Mapping[str, Captions]]
"""Gives, for a tar, captions of samples that have none in it, by the name of the sample."""

_INDEX_VERSION = 1
"""Of the index of a tar: to be raised when `_index` finds something else in the same tar."""

_HEAD_BYTES = 2**15  # hold a picture's header, unless a thumbnail or a profile is in it
_ABSENT = (0, -1)  # in place of a file's offset and size
_PICTURE, _TXT, _JSON = "picture", "txt", "json"


class TarSource(PictureSource):
    """The captioned pictures of tar files, in their order, each read from its place in its tar.

    A caption is in the .txt of the sample, else in its .json, else `further` has it. Each tar is
    walked through once for an index of its samples, and again when it has changed.
    """

    def __init__(
        self,
        paths: Sequence[Place],
        resolution: int,
        max_bad_share: float,
        further: FurtherCaptions | None = None,
        given: GivenCaption = GivenCaption(),  # noqa: B008
    ):
        """paths: the tars. further: captions of samples that have none in their tar. given: the
        caption that is given for all.

        Raises UserError where there is no usable picture, or where too many are bad.
        """
        super().__init__(resolution, given)
        self._paths = list(paths)
        self._stamps = stamps_of(self._paths)
        self._further: list[Mapping[str, Captions]] = []
        self._shards: list[np.ndarray] = []
        bad: dict[str, list[str]] = {}
        for path, stamp in zip(self._paths, self._stamps, strict=True):
            rules = (_INDEX_VERSION, PICTURE_SUFFIXES)
            rows = scan_once("tar", rules, stamp, partial(_index, path))
            captions, usable = {}, rows["reason"] == b""
            silent = usable & (rows[_TXT][:, 1] < 0) & (rows[_JSON][:, 1] < 0)
            if silent.any() and further is not None:
                known = further(path)
                captions = {
                    key: known[key] for key in map(_text, rows["key"][silent]) if key in known
                }
            for i in np.flatnonzero(silent | ~usable):
                key, reason = _text(rows["key"][i]), _text(rows["reason"][i])
                if reason or (key not in captions and given.default is None):
                    reason = reason or "without a caption (in a .txt or .json of its name)"
                    bad.setdefault(reason, []).append(f"{path.name}/{key}")
                    usable[i] = False
            self._shards.append(rows[usable])
            self._further.append(captions)
        self._starts = np.cumsum([0, *map(len, self._shards)])
        total = len(self) + sum(map(len, bad.values()))
        where = str(self._paths[0].parent)
        if total == 0:
            suffixes = ", ".join(PICTURE_SUFFIXES)
            raise UserError(f"{len(self._paths)} tars in {where} hold no pictures ({suffixes})")
        self.bad = BadExamples(total, max_bad_share)
        self.bad.add_unlisted(where, bad)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{self._paths[shard]}/{printable(_text(row['key']))}"

    def id(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{self._paths[shard].name}/{printable(_text(row['key']))}"

    def stamp(self) -> bytes:
        return b"".join(self._stamps)

    def _find(self, index: int) -> tuple[int, Any]:
        """The number of the tar that example `index` is in, and its row of the tar's index."""
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        return shard, self._shards[shard][index - self._starts[shard]]

    def _caption(self, index: int) -> Captions:
        shard, row = self._find(index)
        if row[_TXT][1] >= 0:
            return caption_from_text(self._bytes(shard, row[_TXT]), "its .txt")
        if row[_JSON][1] < 0:
            further = self._further[shard].get(_text(row["key"]))
            if further is None:
                raise NoCaptionError("without a caption")
            return further
        content = self._bytes(shard, row[_JSON])
        try:
            caption = caption_from_json(json.loads(content.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            raise BadExampleError("its .json is not UTF-8 JSON") from error
        if not caption:
            raise NoCaptionError("its .json has no caption")
        return caption

    def _file(self, index: int) -> io.BytesIO:
        shard, row = self._find(index)
        return io.BytesIO(self._bytes(shard, row[_PICTURE]))

    def _head(self, index: int) -> io.BytesIO:
        shard, row = self._find(index)
        return io.BytesIO(self._bytes(shard, row[_PICTURE], most=_HEAD_BYTES))

    def _bytes(self, shard: int, place: np.ndarray, most: int | None = None) -> bytes:
        """The bytes at `place`, (offset, size), in a tar; at most the first `most` of them.

        Raises BadExampleError where they cannot be read.
        """
        offset, size = map(int, place)
        size = size if most is None else min(size, most)
        try:
            content = _read(self._paths[shard], offset, size)
        except OSError as error:
            raise BadExampleError(f"cannot read the tar: {error.strerror}") from error
        if len(content) < size:
            raise BadExampleError(f"the tar ends after {len(content)} of its {size} bytes")
        return content


def _read(path: Place, offset: int, size: int) -> bytes:
    if in_bucket(path):
        return read_bytes(path, offset, size)
    # Opened for each read: there may be more tars than a process may hold open files.
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, size, offset)
    finally:
        os.close(handle)


def _index(path: Place) -> tuple[np.ndarray, bool]:
    """A row for each sample with a picture in a tar and for each damaged part, in order.

    Also returns whether the system let the tar be read to its end. Fields of a row: `key`, the name
    of the sample, or where the tar is damaged; `picture`, `txt` and `json`, (offset, size) of their
    bytes in the tar, _ABSENT where there is none; `reason`, empty for a sample, else the damage.
    """
    rows: list[tuple] = []
    complete = True
    try:
        for key, members in _samples(path):
            if isinstance(members, Broken):
                rows.append((os.fsencode(key), *[_ABSENT] * 3, os.fsencode(members.reason)))
            elif _PICTURE in members:
                places = [members.get(kind, _ABSENT) for kind in (_PICTURE, _TXT, _JSON)]
                rows.append((os.fsencode(key), *places, b""))
    except OSError as error:
        complete = False
        reason = f"cannot be read ({error.strerror or error})"
        rows.append((b"", *[_ABSENT] * 3, reason.encode()))
    place = ("<i8", 2)
    widths = [max((len(row[i]) for row in rows), default=1) or 1 for i in (0, -1)]
    fields = [
        ("key", f"S{widths[0]}"),
        (_PICTURE, *place),
        (_TXT, *place),
        (_JSON, *place),
        ("reason", f"S{widths[1]}"),
    ]
    return np.array(rows, fields), complete


def _samples(path: Place) -> Iterator[tuple[str, dict[str, tuple[int, int]] | Broken]]:
    """(name, kind of file -> its offset and size) of each sample; (place, Broken) of damage."""
    current, members = None, {}
    for member in walk(path):
        if isinstance(member, Broken):
            yield member.where, member
            continue
        folder, name = posixpath.split(member.name)
        stem, _, suffix = name.partition(".")
        if not stem or not suffix or "__MACOSX" in folder:
            continue
        key = posixpath.join(folder, stem)
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        suffix = f".{suffix.lower()}"
        kind = _PICTURE if suffix in PICTURE_SUFFIXES else suffix[1:]
        if kind in (_PICTURE, _TXT, _JSON):
            members.setdefault(kind, (member.offset, member.size))
    if current is not None:
        yield current, members


def _text(key: bytes) -> str:
    """A name in the index as text."""
    return os.fsdecode(key)
