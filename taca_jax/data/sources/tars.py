"""The files within tar archives: where the bytes of each are, so that they can be read at random.

`tarfile` reads the headers. By itself it stops at a damaged one or passes over it in silence, and
takes a size that it cannot read for 0; archives that downloads and crashes have cut or torn are
walked here header by header instead, which reports what is damaged and goes on behind it.
"""

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from taca_jax.errors import UserError
from taca_jax.storage.places import SCHEME, Place, filesystem, is_bucket_name, place, reach, stats

_BLOCK = tarfile.BLOCKSIZE
_NO_SIZE = "its size is no number of bytes"
_CUT_OFF = "cut off by the end of its tar"
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
_ENCODING, _ERRORS = "utf-8", "surrogateescape"  # of names, whose bytes may be anything


@dataclass(frozen=True, slots=True)
class Member:
    """A file within a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Broken:
    """A part of a tar that cannot be read: the file or the byte, and why."""

    where: str
    reason: str


def walk(path: Place) -> Iterator[Member | Broken]:
    """The regular files within a tar, in order, and what of the tar is damaged.

    After damage the walk goes on at the next block that is a header. Raises OSError where the tar
    cannot be opened or read.
    """
    with path.open("rb") as file, _Headers(file) as tar:
        end = file.seek(0, os.SEEK_END)
        lost = False  # behind damage, until the next header
        while tar.offset < end:
            start = tar.offset
            file.seek(start)
            try:
                header = tarfile.TarInfo.fromtarfile(tar)  # moves tar.offset to the next header
            except (tarfile.HeaderError, ValueError):  # the latter for damaged sparse headers
                # The damaged block is the last one read; a header with a long name may precede it.
                start = max(start, (file.tell() - 1) // _BLOCK * _BLOCK)
                broken = _broken_header(file, start)
                tar.offset = start + _BLOCK
                if broken is not None and not lost:
                    yield broken
                    lost = True
                continue
            lost = False
            if header.size < 0 or not _is_size(header.pax_headers.get("size", "0")):
                yield Broken(header.name, _NO_SIZE)
                tar.offset, lost = header.offset_data, True
            elif not header.isreg() or header.issparse():  # a sparse file's bytes are in pieces
                continue
            elif header.offset_data + header.size > end:
                yield Broken(header.name, _CUT_OFF)
            else:
                yield Member(header.name, header.offset_data, header.size)


def expand(pattern: str) -> list[Place]:
    """The files that a pattern names: `{00000..00099}` counts, `{a,b}` chooses, `*` and `?` match.

    They may be in a bucket. Raises UserError where a file that is named without `*` or `?` is
    missing, or none matches.
    """
    names: list[str] = []
    for name in _braces(os.path.expanduser(pattern)):
        names += sorted(_matching(name)) if glob.has_magic(name) else [name]
    paths = [place(name) for name in names]
    missing = [path for path, found in zip(paths, stats(paths), strict=True) if found is None]
    if missing:
        raise UserError(
            f"webdataset:{pattern} names {len(paths)} files, of which {len(missing)} are not there "
            f"(such as {missing[0]}); name those that are"
        )
    if not paths:
        raise UserError(f"webdataset:{pattern} matches no file")
    return paths


def _matching(pattern: str) -> list[str]:
    """The files whose names match a pattern with `*` or `?`."""
    if is_bucket_name(pattern):
        reach(place(pattern))
        return [SCHEME + name for name in filesystem().glob(pattern)]
    return glob.glob(pattern, recursive=True)


def _braces(pattern: str) -> list[str]:
    """A pattern with its braces expanded in every way, the rightmost changing fastest."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    """What the text between two braces stands for."""
    if numbers := _NUMBERS.fullmatch(inside):
        first, last = numbers.groups()
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return inside.split(",")


class _Headers(tarfile.TarFile):
    """A tar of which `walk` reads one header after the other; opening it reads none."""

    def __init__(self, file: IO[bytes]):
        super().__init__(fileobj=file, encoding=_ENCODING, errors=_ERRORS)

    def next(self) -> None:
        return None


def _broken_header(file: IO[bytes], offset: int) -> Broken | None:
    """What is wrong with the block at `offset`, which is no usable header; None for zeros.

    Zeros end an archive, which others may follow.
    """
    file.seek(offset)
    block = file.read(_BLOCK)
    if not block.strip(b"\0"):
        return None
    if not file.read(1):  # behind the last header of a whole archive come zeros
        return Broken(f"byte {offset}", _CUT_OFF)
    try:
        header = tarfile.TarInfo.frombuf(block, _ENCODING, _ERRORS)
    except tarfile.HeaderError:
        return Broken(f"byte {offset}", "broken tar header")
    # Newer versions of tarfile refuse a size below 0 as they read.
    return Broken(header.name, _NO_SIZE if header.size < 0 else "broken tar header")


def _is_size(text: str) -> bool:
    """Whether it is a whole number, of no more digits than any size has."""
    return re.fullmatch("[0-9]{1,19}", text) is not None
