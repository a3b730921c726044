"""Tar files by random access: where each member's bytes are, found once by walking the headers.

Written for archives that downloads and crashes have cut or torn: what cannot be read is named, and
what stands behind it is found again. Format: POSIX.1-2001 pax, with GNU's long names.
"""

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from taca_jax.errors import UserError

_BLOCK = 512
_AT_ONCE = 2048  # blocks read at a time where a header is looked for
_MAGIC = slice(257, 262)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LONG_NAME, _PAX, _PAX_GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


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


def walk(path: Path) -> Iterator[Member | Broken]:
    """The files within a tar, in order, and what of it is broken.

    Behind a broken header the next good one is looked for. Raises OSError where the tar cannot be
    opened or read.
    """
    with path.open("rb") as file:
        handle, end = file.fileno(), path.stat().st_size
        offset, long_name, pax = 0, None, {}
        while offset < end:
            block = os.pread(handle, _BLOCK, offset)
            if not block.strip(b"\0"):  # the end, or the end of one that others follow
                offset += _BLOCK
                continue
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                yield Broken(f"byte {offset}", "broken tar header")
                offset = _next_header(handle, offset + _BLOCK, end)
                long_name, pax = None, {}
                continue
            data, kind = offset + _BLOCK, header.type
            size = header.size
            if kind in _FILES and "size" in pax:
                size = _whole_number(pax["size"])
            if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
                size = 0
            name = pax.get("path") or long_name or header.name
            if size < 0:  # also what headers say in binary
                yield Broken(name, "its size is no number of bytes")
                offset = _next_header(handle, data, end)
                long_name, pax = None, {}
                continue
            if data + size > end:
                yield Broken(name, "cut off by the end of its tar")
                return
            offset = data + -(-size // _BLOCK) * _BLOCK
            if kind == _LONG_NAME:
                long_name = os.fsdecode(os.pread(handle, size, data).rstrip(b"\0"))
            elif kind == _PAX:
                pax = _pax(os.pread(handle, size, data))
            elif kind != _PAX_GLOBAL:
                if kind in _FILES:
                    yield Member(name, data, size)
                long_name, pax = None, {}


def expand(pattern: str) -> list[Path]:
    """The files that a pattern names: `{00000..00099}` counts, `{a,b}` chooses, `*` and `?` match.

    Raises UserError where one of those that are named without `*` is missing, or there is none.
    """
    paths: list[str] = []
    for name in _braces(os.path.expanduser(pattern)):
        paths += sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"webdataset:{pattern} names {len(paths)} files, of which {len(missing)} are not there "
            f"(such as {missing[0]}); name those that are"
        )
    if not paths:
        raise UserError(f"webdataset:{pattern} matches no file")
    return [Path(path) for path in paths]


def _braces(pattern: str) -> list[str]:
    """All that the braces of a pattern stand for, the rightmost changing fastest."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    if numbers := _NUMBERS.fullmatch(inside):
        first, last = numbers.groups()
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return inside.split(",")


def _next_header(handle: int, offset: int, end: int) -> int:
    """Where the next good header is at or behind `offset`, or the end."""
    while offset < end:
        blocks = os.pread(handle, _AT_ONCE * _BLOCK, offset)
        for start in range(0, len(blocks), _BLOCK):
            block = blocks[start : start + _BLOCK]
            if block[_MAGIC] == b"ustar" and _is_header(block):
                return offset + start
        offset += _AT_ONCE * _BLOCK
    return end


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _whole_number(text: str) -> int:
    """What a pax header says; -1 where that is no number, or one with more digits than any size."""
    return int(text) if re.fullmatch("[0-9]{1,19}", text) else -1


def _pax(content: bytes) -> dict[str, str]:
    """The records of a pax header, `LENGTH KEY=VALUE` a line; what is none ends it."""
    records: dict[str, str] = {}
    while match := re.match(rb"(\d+) ([^=]+)=", content):
        length = int(match[1])
        if length <= match.end():
            break
        value = content[match.end() : length - 1]
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return records
