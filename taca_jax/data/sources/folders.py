"""A folder of pictures, with captions in tables or in a file beside each picture."""

import io
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taca_jax.data.sources.bad_examples import BadExampleError, BadExamples, NoCaptionError
from taca_jax.data.sources.captions import GivenCaption, caption_from_json, caption_from_text
from taca_jax.data.sources.source import PICTURE_SUFFIXES, PictureSource, printable
from taca_jax.data.sources.stored_scans import stamp_in_bucket, stamp_of
from taca_jax.errors import UserError
from taca_jax.storage.places import Place, Stat, files_in, in_bucket, read_bytes

CAPTIONS_FILE = "captions.jsonl"
"""What a table of captions is called."""

_FILE_KEYS = ("file", "file_name")
_BESIDE = (".txt", ".json")  # suffixes of caption files, the first that is there counts

Captions = str | Sequence[str]
FurtherCaptions = Callable[[str], Mapping[str, Captions]]
"""Gives, for a folder, captions of pictures that have none elsewhere, by the stem of the file."""


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str  # of the picture, under the source's folder, with slashes
    caption: Captions | None  # None: in the file beside the picture
    id: str
    beside: str = ""  # the suffix of that file


class FolderSource(PictureSource):
    """The captioned pictures under a folder, in the order of their paths.

    A caption is in a table `captions.jsonl`, or in a .txt or .json of the picture's name. A line of
    the table is `{"file": PATH, "caption": TEXT}`, the path relative to the table; `file_name` may
    stand for `file`, and for `caption` what `CAPTION_KEYS` has. A list of captions gives a picture
    several.
    """

    def __init__(
        self,
        root: Place,
        resolution: int,
        max_bad_share: float,
        further: FurtherCaptions | None = None,
        given: GivenCaption = GivenCaption(),  # noqa: B008
    ):
        """root: the folder, which may be in a bucket. further: captions of pictures that have none
        in tables or files. given: the caption that is given for all.

        Raises UserError for a folder without usable pictures, or with too many bad ones.
        """
        super().__init__(resolution, given)
        self._root = root.expanduser()
        listing = _Listing(self._root, further, given.default)
        self._stats = listing.stats
        self._entries = listing.entries
        total = len(self._entries) + sum(len(names) for names in listing.bad.values())
        if total == 0:
            raise UserError(f"{self._root} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
        self.bad = BadExamples(total, max_bad_share)
        self.bad.add_unlisted(str(self._root), listing.bad)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        return str(self._path(index))

    def id(self, index: int) -> str:
        return self._entries[index].id

    def stamp(self) -> bytes:
        return b"".join(self._stamp(index) for index in range(len(self)))

    def _stamp(self, index: int) -> bytes:
        path = self._path(index)
        if in_bucket(path):
            return stamp_in_bucket(path, self._stats[self._entries[index].path])
        return stamp_of(path)

    def _path(self, index: int) -> Place:
        return self._root / self._entries[index].path

    def _file(self, index: int) -> Path | io.BytesIO:
        path = self._path(index)
        return path if isinstance(path, Path) else io.BytesIO(_content(path))

    def _caption(self, index: int) -> Captions:
        entry = self._entries[index]
        if entry.caption is not None:
            return entry.caption
        file = self._path(index).with_suffix(entry.beside)
        content = _content(file)
        if entry.beside == ".txt":
            return caption_from_text(content, file.name)
        if not (caption := caption_from_json(_json(content))):
            raise NoCaptionError(f"{file.name} has no caption")
        return caption


class _Listing:
    """The pictures and captions of a folder, by the names of its files and by its tables.

    No picture is opened. `bad` has what cannot be used: paths by the reason. With a `default`, no
    picture is bad for want of a caption. `stats` has size and time of all files of a bucket, by
    their paths under its folder.
    """

    entries: list[_Entry]
    bad: dict[str, list[str]]
    stats: Mapping[str, Stat]

    def __init__(self, root: Place, further: FurtherCaptions | None, default: str | None):
        self.entries, self.bad = [], {}
        self._default = default
        self.stats = files_in(root) if in_bucket(root) else {}
        names = self.stats if in_bucket(root) else _names_in(root)
        pictures, texts, tables = _sorted_out(names)
        named: set[str] = set()
        for table in tables:
            for number, line in _lines(root / table):
                self._read_line(line, table, number, pictures, named)
        silent: dict[str, list[str]] = {}
        for path in sorted(pictures - named):
            stem = os.path.splitext(path)[0]
            beside = next((suffix for suffix in _BESIDE if stem + suffix in texts), None)
            if beside is None:
                silent.setdefault(posixpath.dirname(path), []).append(path)
            else:
                self.entries.append(_Entry(path, None, printable(path), beside))
        for folder, paths in silent.items():
            captions = {} if further is None else further(folder)
            for path in paths:
                stem = posixpath.splitext(posixpath.basename(path))[0]
                if caption := captions.get(stem) or default:
                    self.entries.append(_Entry(path, caption, printable(path)))
                else:
                    reason = (
                        f"without a caption (in {CAPTIONS_FILE}, or a .txt beside it; data.caption "
                        "gives one)"
                    )
                    self._add_bad(reason, path)
        self.entries.sort(key=lambda entry: (entry.path, entry.id))

    def _read_line(
        self, line: bytes, table: str, number: int, pictures: set[str], named: set[str]
    ) -> None:
        where = f"{printable(table)}:{number}"
        record = _json(line)
        file = caption = None
        if isinstance(record, dict):
            file = next((record[key] for key in _FILE_KEYS if key in record), None)
            caption = caption_from_json({k: v for k, v in record.items() if k not in _FILE_KEYS})
        if not isinstance(file, str) or caption is None:
            self._add_bad('not a line of UTF-8 JSON with "file" and "caption"', where)
            return
        path = posixpath.normpath(posixpath.join(posixpath.dirname(table), file))
        if path not in pictures:
            reason = f"named in {CAPTIONS_FILE} but not there (as {', '.join(PICTURE_SUFFIXES)})"
            self._add_bad(reason, path)
            return
        # Each of several lines about a picture makes an example.
        ident = printable(path) + (f"#{number}" if path in named else "")
        named.add(path)
        if caption := caption or self._default:
            self.entries.append(_Entry(path, caption, ident))
        else:
            self._add_bad("with an empty caption", path)

    def _add_bad(self, reason: str, name: str) -> None:
        self.bad.setdefault(reason, []).append(printable(name))


def _content(path: Place) -> bytes:
    """Raises BadExampleError where it cannot be read."""
    try:
        return read_bytes(path) if in_bucket(path) else path.read_bytes()
    except OSError as error:
        raise BadExampleError(f"cannot read {path.name}: {error.strerror}") from error


def check_folder(root: Place) -> None:
    """Raises UserError for a local path that is no folder."""
    root = root.expanduser()
    if not in_bucket(root) and not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {state}; data.source=folder:PATH takes a folder of pictures")


def _names_in(root: Path) -> Iterator[str]:
    """The paths of all files under a folder."""
    check_folder(root)

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for folder, inner, files in os.walk(root, onerror=fail):
        # Not folders that systems make: .ipynb_checkpoints, .git, a Mac's resource forks.
        inner[:] = sorted(name for name in inner if name[0] != "." and name != "__MACOSX")
        prefix = Path(folder).relative_to(root).as_posix() + "/"
        prefix = "" if prefix == "./" else prefix
        yield from (prefix + name for name in files)


def _sorted_out(names: Iterable[str]) -> tuple[set[str], set[str], list[str]]:
    """The pictures, the .txt and .json files, and the tables among files."""
    pictures: set[str] = set()
    texts: set[str] = set()
    tables: list[str] = []
    for path in names:
        name, suffix = posixpath.basename(path), posixpath.splitext(path)[1].lower()
        if name.startswith("."):
            continue
        if name == CAPTIONS_FILE:
            tables.append(path)
        elif suffix in PICTURE_SUFFIXES:
            pictures.add(path)
        elif suffix in _BESIDE:
            texts.add(path)
    return pictures, texts, sorted(tables)


def _lines(path: Place) -> Iterator[tuple[int, bytes]]:
    """(number counted from 1, line) of each line that is not blank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, line


def _json(content: bytes) -> object:
    """The value of a JSON text; None where it is not JSON."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError among them
        return None
