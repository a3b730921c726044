"""The record in a folder of results: the configuration and the weights that they belong to.

A command calls `check_record` before anything slow, and `write_record` once its model has loaded,
so that a command that could not start does not stand in the way of the next one.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from taca_jax.config.fields import difference, show
from taca_jax.config.json_text import from_json, to_tree
from taca_jax.errors import UserError
from taca_jax.evaluation.digests import digests_in, digests_of_loras
from taca_jax.formats.atomic import whole_file
from taca_jax.pipelines.config import SamplingConfig
from taca_jax.pipelines.lora_choice import LoRAChoice, parse_loras
from taca_jax.pipelines.loras import used_loras
from taca_jax.weights.shipped import find_weights

RECORD = "config.json"
"""The file's name."""

OUT = "out"
"""The field that names the folder; it is not recorded, so that the folder can be moved."""

MESH = "mesh"
"""The field that says which devices share the work. It is recorded, and may change."""


@dataclass(frozen=True)
class _Record:
    """config: without `out`. digests: of each field that names files, by name in a folder."""

    config: SamplingConfig
    digests: Mapping[str, dict[str, str]]


Files = Mapping[str, str | tuple[LoRAChoice, ...]]
"""By field of a configuration, the file or folder, or the LoRAs, that it names."""


def model_files(config: SamplingConfig) -> Files:
    """The fields that name the weights which the pictures depend on: the base, and the LoRAs unless
    taca=none turns them off."""
    loras = used_loras(config)
    return {"base": config.base, **({"lora": loras} if loras else {})}


def check_record(
    out: Path, config: SamplingConfig, files: Files, *, free: Collection[str] = ()
) -> None:
    """Raises UserError, naming what differs, if the folder belongs to another configuration or to
    files of other content; also if it holds something else, or cannot be written to.

    files: fields of the configuration that are compared by the content of the files which they
    name (`digests.file_digest`), not by name. free: other fields that may change, as `mesh` may.
    """
    record = out / RECORD
    if not record.is_file():
        _check_place(out)
        return
    before = _read(record, type(config))
    digests = _digests(files)
    compared = before.digests.keys() | digests.keys()
    differing = [
        f"{name} is {_shown(there)} there, {_shown(here)} here"
        for name, (there, here) in difference(before.config, config).items()
        if name.partition(".")[0] not in {OUT, MESH, *free, *compared}
    ]
    for name in sorted(compared):
        there, here = getattr(before.config, name), getattr(config, name)
        old, new = before.digests.get(name), digests.get(name)
        if old == new:
            continue
        if there != here:
            differing.append(f"{name} is {_shown(there)} there, {_shown(here)} here")
        elif old is None or new is None:
            differing.append(f"{name} is used {'there' if new is None else 'here'} alone")
        else:
            changed = min(part for part in old | new if old.get(part) != new.get(part))
            place = Path(there, changed)
            if name == "lora":
                named = parse_loras(there)
                number = int(changed) if changed.isdecimal() else 1
                place = Path(named[number - 1].path, "" if changed.isdecimal() else changed)
            differing.append(f"{place} has changed since")
    if differing:
        raise UserError(
            f"{out} holds results of something else: {', '.join(differing)}; name another out, or "
            "remove it"
        )


def write_record(out: Path, config: SamplingConfig, files: Files) -> None:
    """Writes what `check_record` reads, creating the folder. Raises UserError if it cannot."""
    settings = {name: value for name, value in to_tree(config).items() if name != OUT}
    content = {"config": settings, "files": _digests(files)}
    with whole_file(out / RECORD) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")


def _shown(value: Any) -> str:
    return "set" if is_dataclass(value) else show(value) or "empty"


def _digests(files: Files) -> dict[str, dict[str, str]]:
    return {
        name: digests_in(find_weights(named)) if isinstance(named, str) else digests_of_loras(named)
        for name, named in files.items()
    }


def _read(record: Path, kind: type[SamplingConfig]) -> _Record:
    """Raises UserError for a file that is not the record of such a configuration."""
    try:
        content: Any = json.loads(record.read_text())
        config = from_json(kind, json.dumps(content["config"]), str(record))
        digests = {name: dict(found) for name, found in content["files"].items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{record} is not the record of such results ({error}); name another out"
        ) from None
    return _Record(config, digests)


def _check_place(out: Path) -> None:
    """Raises UserError unless `out` can be created, or is an empty folder that can be written to.

    Hidden files do not count: a writer that was killed may have left one.
    """
    place = next(each for each in (out, *out.absolute().parents) if each.exists())
    if not place.is_dir():
        raise UserError(f"{out} cannot be written to: {place} is a file; name another out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be written to: no permission in {place}; name another out")
    if place == out and any(not each.name.startswith(".") for each in out.iterdir()):
        raise UserError(f"{out} holds something else; name another out")
