"""The output of img2dataset: a tar or a folder for each shard, and a table in parquet beside it.

The names (`00000.tar` or `00000/`, and `00000.parquet`) and the columns are as in img2dataset's
README, "Output format".
"""

import io
from collections.abc import Mapping
from typing import Any

from taca_jax.data.sources.captions import GivenCaption
from taca_jax.data.sources.folders import FolderSource
from taca_jax.data.sources.webdataset import TarSource
from taca_jax.errors import UserError
from taca_jax.storage.places import Place, in_bucket, read_bytes

_SUCCESS = "success"


def open_img2dataset(
    root: Place,
    resolution: int,
    max_bad_share: float,
    given: GivenCaption = GivenCaption(),  # noqa: B008
) -> FolderSource | TarSource:
    """The pictures of an output folder `root`, written as webdataset or as files.

    Captions are in a .txt or .json of the picture's name, else in the shard's parquet, which is
    only read then and needs pyarrow. Raises UserError as FolderSource and TarSource do, and for a
    parquet that cannot be read.
    """
    root = check_output(root)
    if tars := sorted(root.glob("*.tar")):
        return TarSource(
            tars,
            resolution,
            max_bad_share,
            lambda tar: _captions(tar.with_suffix(".parquet")),
            given,
        )
    return FolderSource(
        root,
        resolution,
        max_bad_share,
        lambda folder: _captions(root / f"{folder}.parquet"),
        given,
    )


def check_output(root: Place) -> Place:
    """The output folder. Raises UserError where it is none."""
    root = root.expanduser()
    if not root.is_dir():
        raise UserError(f"{root} is not there; data.source=img2dataset:PATH takes an output folder")
    return root


def _captions(parquet: Place) -> Mapping[str, str]:
    """The captions of a shard by the key of the picture; empty where there is no parquet."""
    if not parquet.is_file():
        return {}
    try:
        import pyarrow.parquet  # optional, and needed here alone
    except ImportError:
        raise UserError(
            f"captions are in {parquet}, which needs pyarrow (pip install pyarrow)"
        ) from None
    reader: Any = pyarrow.parquet
    try:
        file = io.BytesIO(read_bytes(parquet)) if in_bucket(parquet) else parquet
        names = set(reader.read_schema(file).names)
        if not {"key", "caption"} <= names:
            return {}
        columns = ["key", "caption", *(["status"] if "status" in names else [])]
        rows = reader.read_table(file, columns=columns).to_pylist()
    except Exception as error:  # pyarrow raises errors of many classes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{parquet} cannot be read ({reason}); write it again") from error
    return {
        row["key"]: row["caption"].strip()
        for row in rows
        if row.get("status", _SUCCESS) == _SUCCESS and (row["caption"] or "").strip()
    }
