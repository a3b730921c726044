"""Random-access sources of captioned pictures: the shapes data, and folders.

`open_source` is the only way in. A source's pictures are square, of `data.resolution`, so that
nothing after it resizes.
"""

import json
import logging
import os
import posixpath
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from taca_jax.data.config import DataConfig
from taca_jax.data.shapes_drawing import IMAGE_SIZE
from taca_jax.data.shapes_examples import GeneratedShapes
from taca_jax.errors import UserError

GENERATED_SIZE = 2**20
CAPTIONS_FILE = "captions.jsonl"

_MAX_SIZE = 2**24  # an epoch's order is held in memory
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")
_FILE_KEYS = ("file", "file_name")
_CAPTION_KEYS = ("caption", "text", "name")
_LEAST_LOOKED = 50  # before fewer, a share says little
_NAMED = 3  # in messages about many

_log = logging.getLogger(__name__)


class Example(TypedDict):
    image: np.ndarray  # uint8 [resolution, resolution, 3], RGB
    caption: str
    id: str


class Source(Protocol):
    """Examples by index. `[i]` raises BadExampleError for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class BadExampleError(Exception):
    """This example cannot be used; it has been counted and logged. Others can."""


def open_source(data: DataConfig) -> Source:
    """The source that `data.source` names, with pictures of `data.resolution`.

    Raises UserError for a source that is unknown, empty, missing or mostly unusable, and for a
    resolution that shapes do not have.
    """
    kind, _, place = data.source.partition(":")
    if kind == "folder":
        return FolderSource(Path(place), data.resolution, data.max_bad_share)
    name, _, rest = place.partition("/")
    if name != "shapes":
        raise UserError(
            f"data.source is {data.source}; of {kind} only {kind}:shapes is read so far: for other "
            "pictures use folder:PATH"
        )
    if data.resolution != IMAGE_SIZE:
        raise UserError(
            f"data.resolution is {data.resolution}, but shapes are drawn at {IMAGE_SIZE} pixels "
            f"and not resized: set data.resolution={IMAGE_SIZE}"
        )
    if kind == "generated":
        size = rest or str(GENERATED_SIZE)
        if not (size.isascii() and size.isdigit() and 1 <= int(size) <= _MAX_SIZE):
            raise UserError(
                f"data.source is {data.source}; after generated:shapes/ comes a number of "
                f"examples, 1 to {_MAX_SIZE}"
            )
        return GeneratedShapes("train", int(size))
    # Imported here because it takes seconds, which the other sources need not wait for.
    from taca_jax.data import shapes

    # `load` refuses an unknown size.
    return shapes.load(rest or "small", "train", shapes.DEFAULT_DATA_DIR)  # pyright: ignore[reportArgumentType]


class BadExamples:
    """Counts the examples that cannot be used, each once, and says when they are too many.

    Too many are: more than `max_share` of all `total`; or, earlier, so many of those looked at that
    chance does not explain it; or all.
    """

    def __init__(self, total: int, max_share: float, listed: int = 0):
        """`listed` bad ones are known from the start, and are among `total`."""
        self.total = total
        self.max_share = max_share
        self._listed = listed
        self._bad: set[int] = set()
        self._looked: set[int] = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return self._listed + len(self._bad)

    def good(self, index: int) -> None:
        """Example `index` was read."""
        with self._lock:
            self._looked.add(index)

    def bad(self, index: int, name: str, reason: str) -> None:
        """Example `index` could not be read. Raises UserError when that makes too many."""
        with self._lock:
            self._looked.add(index)
            if index not in self._bad:
                self._bad.add(index)
                _log.warning("skipped %s: %s (%d bad so far)", name, reason, self.count)
            self.check(name, reason)

    def check(self, name: str, reason: str) -> None:
        """Raises UserError, giving `name` and `reason` as an instance, when there are too many."""
        share = self.max_share
        found, looked = len(self._bad), len(self._looked)
        # Three standard deviations: of a folder below the share, hardly any beginning is so bad.
        usual = share * looked + 3 * (share * looked) ** 0.5
        if self.count > share * self.total or self.count == self.total:
            seen = f"{self.count} of {self.total}"
        elif looked >= _LEAST_LOOKED and found > usual:
            seen = f"{found} of the first {looked}"
        else:
            return
        raise UserError(
            f"{seen} pictures cannot be used, more than data.max_bad_share={share:g} allows (such "
            f"as {name}: {reason}): repair or remove them, or raise data.max_bad_share"
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str  # under the folder, with slashes
    caption: str | None  # None: in the .txt beside it
    id: str


class FolderSource:
    """Pictures under a folder, each with its caption; in the order of their paths.

    A caption stands in a `captions.jsonl` (one `{"file": PATH, "caption": TEXT}` a line, the path
    relative to it; `file_name` and `text` or `name` are read too), or in a .txt of the picture's
    name. What cannot be used is counted in `bad`, and logged once.
    """

    def __init__(self, root: Path, resolution: int, max_bad_share: float):
        """Raises UserError for a folder without usable pictures, or with too many bad ones."""
        self._root = root.expanduser()
        self._resolution = resolution
        listing = _Listing(self._root)
        self._entries = listing.entries
        total = len(self._entries) + sum(len(names) for names in listing.bad.values())
        self.bad = BadExamples(total, max_bad_share, total - len(self._entries))
        if total == 0:
            raise UserError(f"{self._root} holds no pictures ({', '.join(_SUFFIXES)})")
        for reason, names in listing.bad.items():
            _log.warning("%s: skipped %d: %s: %s", self._root, len(names), reason, _some(names))
        for reason, names in listing.bad.items():
            self.bad.check(f"{self._root / names[0]}", reason)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        entry = self._entries[index]
        path = self._root / entry.path
        try:
            caption = _beside(path) if entry.caption is None else entry.caption
            image = read_picture(path, self._resolution)
        except BadExampleError as error:
            self.bad.bad(index, str(path), str(error))
            raise
        self.bad.good(index)
        return {"image": image, "caption": caption, "id": entry.id}


class _Listing:
    """What a folder's files say, without opening a picture."""

    entries: list[_Entry]
    bad: dict[str, list[str]]  # reason -> paths

    def __init__(self, root: Path):
        self.entries, self.bad = [], {}
        pictures, texts, tables = _files(root)
        named: set[str] = set()
        for table in tables:
            for number, line in _lines(root / table):
                self._read_line(line, table, number, pictures, named)
        for path in sorted(pictures - named):
            if os.path.splitext(path)[0] + ".txt" in texts:
                self.entries.append(_Entry(path, None, _printable(path)))
            else:
                reason = f"without a caption (in {CAPTIONS_FILE}, or a .txt beside it)"
                self._add_bad(reason, path)
        self.entries.sort(key=lambda entry: (entry.path, entry.id))

    def _read_line(
        self, line: bytes, table: str, number: int, pictures: set[str], named: set[str]
    ) -> None:
        where = f"{_printable(table)}:{number}"
        record = _record(line)
        if record is None:
            keys = f'"{_FILE_KEYS[0]}" and "{_CAPTION_KEYS[0]}"'
            self._add_bad(f"not a line of UTF-8 JSON with {keys}", where)
            return
        file, caption = record
        path = posixpath.normpath(posixpath.join(posixpath.dirname(table), file))
        if path not in pictures:
            reason = f"named in {CAPTIONS_FILE} but not there (as {', '.join(_SUFFIXES)})"
            self._add_bad(reason, path)
            return
        # A picture may have several captions: each makes an example.
        ident = _printable(path) + (f"#{number}" if path in named else "")
        named.add(path)
        if caption:
            self.entries.append(_Entry(path, caption, ident))
        else:
            self._add_bad("with an empty caption", path)

    def _add_bad(self, reason: str, name: str) -> None:
        self.bad.setdefault(reason, []).append(_printable(name))


def _files(root: Path) -> tuple[set[str], set[str], list[str]]:
    """Pictures, .txt files and captions.jsonl files under a folder, relative, with slashes."""
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {state}; data.source=folder:PATH takes a folder of pictures")
    pictures: set[str] = set()
    texts: set[str] = set()
    tables: list[str] = []

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for folder, inner, files in os.walk(root, onerror=fail):
        # Folders that systems leave: .ipynb_checkpoints, .git, a Mac's resource forks.
        inner[:] = sorted(name for name in inner if name[0] != "." and name != "__MACOSX")
        prefix = Path(folder).relative_to(root).as_posix() + "/"
        prefix = "" if prefix == "./" else prefix
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if name == CAPTIONS_FILE:
                tables.append(prefix + name)
            elif suffix in _SUFFIXES:
                pictures.add(prefix + name)
            elif suffix == ".txt":
                texts.add(prefix + name)
    return pictures, texts, sorted(tables)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are not blank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, line


def _record(line: bytes) -> tuple[str, str] | None:
    """(file, caption) of a line of captions.jsonl; None if it does not say both."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError among them
        return None
    if not isinstance(record, dict):
        return None
    file = next((record[key] for key in _FILE_KEYS if key in record), None)
    caption = next((record[key] for key in _CAPTION_KEYS if key in record), None)
    if not isinstance(file, str) or not isinstance(caption, str):
        return None
    return file, caption.strip()


def _beside(path: Path) -> str:
    """The caption in the .txt beside a picture."""
    text = path.with_suffix(".txt")
    try:
        caption = text.read_bytes().decode("utf-8-sig").strip()
    except OSError as error:
        raise BadExampleError(f"cannot read {text.name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadExampleError(f"{text.name} is not UTF-8") from error
    if not caption:
        raise BadExampleError(f"{text.name} is empty")
    return caption


def read_picture(path: Path, resolution: int) -> np.ndarray:
    """uint8 [resolution, resolution, 3]: a file's picture, upright, its central square resized.

    Transparency becomes white; of an animation the first frame is taken; 16-bit grey is scaled,
    CMYK converted without its profile. Raises BadExampleError for what cannot be read.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            # JPEGs much larger than needed decode at a fraction of their size.
            image.draft(None, (2 * resolution, 2 * resolution))
            upright = ImageOps.exif_transpose(image)
            return _resize(_to_rgb(upright), resolution)
    except UnidentifiedImageError as error:
        raise BadExampleError("not a PNG, JPEG or WebP picture") from error
    except OSError as error:
        raise BadExampleError(error.strerror or _first_line(error)) from error
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise BadExampleError(_first_line(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255
        levels = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _resize(image: Image.Image, resolution: int) -> np.ndarray:
    # The square is cut first: a very long picture would otherwise be enlarged as a whole.
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    resized = image.resize(
        (resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0
    )
    return np.asarray(resized, np.uint8)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _printable(path: str) -> str:
    """A path that can be written as UTF-8, whatever bytes its file's name has."""
    return os.fsencode(path).decode("utf-8", "replace")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
