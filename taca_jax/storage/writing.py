"""Writing to a bucket: objects and folders of objects appear whole, or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from taca_jax.storage.places import Place, files_in, filesystem, in_bucket

if TYPE_CHECKING:
    from etils import epath


@contextlib.contextmanager
def uploaded_file(path: "epath.Path") -> Iterator[Path]:
    """Yields a local path to write to, whose file becomes the object when the block succeeds."""
    with tempfile.TemporaryDirectory(prefix="taca_jax-") as folder:
        made = Path(folder, path.name)
        yield made
        filesystem().put_file(str(made), str(path))


@contextlib.contextmanager
def uploaded_folder(path: "epath.Path", marker: str) -> Iterator[Path]:
    """Yields an empty local folder, which replaces the bucket's when the block succeeds.

    marker: the file without which readers take the folder for none. It is the first to go and the
    last to come, so that a folder which is half written is not read, and is replaced by the next
    writer.
    """
    with tempfile.TemporaryDirectory(prefix="taca_jax-") as folder:
        made = Path(folder)
        yield made
        remove(path / marker)
        remove(path)
        last = made / marker
        files = [file for file in sorted(made.rglob("*")) if file.is_file() and file != last]
        for file in [*files, last]:
            name = file.relative_to(made).as_posix()
            filesystem().put_file(str(file), str(path / name))


def remove(path: Place) -> None:
    """Removes a file or folder, with what is in it; it need not be there."""
    if in_bucket(path):
        with contextlib.suppress(FileNotFoundError):
            filesystem().rm(str(path), recursive=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def move(path: Place, to: Place) -> None:
    """Moves a folder to where nothing is, beside it or in another folder of the same bucket or
    disk."""
    if in_bucket(path):
        for name in files_in(path):
            filesystem().cp_file(str(path / name), str(to / name))
        remove(path)
    else:
        assert not in_bucket(to)
        to.parent.mkdir(parents=True, exist_ok=True)
        path.rename(to)


class Mirror:
    """A local folder whose files are copied to a bucket's, for files that grow.

    folder: the local one; of a place that is no bucket the place itself, and nothing is copied.
    """

    folder: Path

    def __init__(self, path: Place):
        self._bucket = path if in_bucket(path) else None
        self.folder = Path(tempfile.mkdtemp(prefix="taca_jax-")) if in_bucket(path) else path
        self._copied: dict[Path, tuple[int, int]] = {}

    def fetch(self, name: str) -> None:
        """Copies a file from the bucket, if it is there."""
        if self._bucket is not None and (self._bucket / name).exists():
            filesystem().get_file(str(self._bucket / name), str(self.folder / name))

    def upload(self) -> None:
        """Copies the files that have changed."""
        if self._bucket is None:
            return
        for file in sorted(self.folder.rglob("*")):
            stat = file.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            if file.is_file() and self._copied.get(file) != state:
                name = file.relative_to(self.folder).as_posix()
                filesystem().put_file(str(file), str(self._bucket / name))
                self._copied[file] = state

    def close(self) -> None:
        """Copies what has changed, and removes the local folder."""
        self.upload()
        if self._bucket is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
