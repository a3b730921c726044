"""The folder of an evaluation: what it was asked for, and the pictures that it has drawn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taca_jax.data.shapes.drawing import IMAGE_SIZE
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.pipelines.config import SamplingConfig
from taca_jax.weights.pipeline_folders import open_pipeline
from taca_jax.weights.shipped import find_weights

RECORD = "config.json"
"""In the folder: what was asked for, and of which files."""

PICTURES = "pictures"
"""The folder in it of what was drawn."""


def prepare(out: Path, asked: Mapping[str, Any], files: Sequence[str]) -> None:
    """Creates the folder of an evaluation, or checks that it holds this one, to go on with it.

    asked: the configuration, as from JSON. files: the model's files and folders, of which sizes and
    times are recorded. Raises UserError if the folder holds something else or cannot be written.
    """
    record = out / RECORD
    content = json.dumps({"config": asked, "files": _stamps(files)}, indent=1) + "\n"
    if record.is_file() and record.read_text() != content:
        raise UserError(
            f"{out} holds another evaluation, or one of files that have changed since; name "
            "another out, or remove it"
        )
    if not record.is_file() and out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no evaluation; name another out")
    try:
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
        with whole_file(record) as file:
            file.write_text(content)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written to ({error.strerror}); name another out"
        ) from None


def check_base(config: SamplingConfig) -> None:
    """Raises UserError for a base that is not there, or draws pictures of another size than shapes
    have."""
    settings = open_pipeline(config.base).settings
    for side in (config.height, config.width):
        pixels = settings.resolution if side is None else side
        if pixels != IMAGE_SIZE:
            raise UserError(
                f"pictures would have {pixels} pixels a side, and shapes are read at {IMAGE_SIZE}; "
                f"give a base of shapes, or height={IMAGE_SIZE} width={IMAGE_SIZE}"
            )


def _stamps(files: Sequence[str]) -> dict[str, list[int]]:
    """The size and the time of the last change of all files, also of those in folders."""
    roots = [find_weights(name) for name in files]
    return {
        str(path): [path.stat().st_size, path.stat().st_mtime_ns]
        for root in roots
        for path in sorted([root, *root.rglob("*")])
        if path.is_file()
    }
