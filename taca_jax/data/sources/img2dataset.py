"""What img2dataset writes: `00000.tar` or a folder `00000/` a shard, `00000.parquet` beside it.

Source of names and columns: img2dataset's README, "Output format".
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taca_jax.data.sources.folders import FolderSource
from taca_jax.data.sources.webdataset import TarSource
from taca_jax.errors import UserError

_SUCCESS = "success"


def open_img2dataset(root: Path, resolution: int, max_bad_share: float) -> FolderSource | TarSource:
    """The pictures of an output folder, in its webdataset or its files layout.

    Captions are in the .txt or .json of a picture's name, else in its shard's parquet, which needs
    pyarrow and is read only then. Raises UserError as the sources do, and for a parquet that cannot
    be read.
    """
    root = root.expanduser()
    if not root.is_dir():
        raise UserError(f"{root} is not there; data.source=img2dataset:PATH takes an output folder")
    if tars := sorted(root.glob("*.tar")):
        return TarSource(
            tars, resolution, max_bad_share, lambda tar: _captions(tar.with_suffix(".parquet"))
        )
    return FolderSource(
        root, resolution, max_bad_share, lambda folder: _captions(root / f"{folder}.parquet")
    )


def _captions(parquet: Path) -> Mapping[str, str]:
    """The captions of a shard by the key of its pictures; none where there is no parquet."""
    if not parquet.is_file():
        return {}
    try:
        import pyarrow.parquet  # the only reader of it
    except ImportError:
        raise UserError(
            f"captions are in {parquet}, which needs pyarrow (pip install pyarrow)"
        ) from None
    reader: Any = pyarrow.parquet
    try:
        names = set(reader.read_schema(parquet).names)
        if not {"key", "caption"} <= names:
            return {}
        columns = ["key", "caption", *(["status"] if "status" in names else [])]
        rows = reader.read_table(parquet, columns=columns).to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{os.fspath(parquet)} cannot be read ({reason}); write it again"
        ) from error
    return {
        row["key"]: row["caption"].strip()
        for row in rows
        if row.get("status", _SUCCESS) == _SUCCESS and (row["caption"] or "").strip()
    }
