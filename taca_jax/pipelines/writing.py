"""Pictures to PNG files with their settings, and what such files say of themselves."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taca_jax.config.json_text import to_tree
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.grids import enlarged
from taca_jax.storage.places import Place, place

_KEY = "taca_jax"

CHANGE_NOTHING = frozenset(
    ["prompts", "out", "num_images", "batch_size", "mesh", "stages", "preview", "progress", "plan"]
)
"""Fields of a command that do not change a picture, or change it by rounding only."""


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """The metadata of a picture that was drawn with these settings, with our version."""
    info = PngInfo()
    info.add_itxt(_KEY, json.dumps({"taca_jax": version("taca-jax"), **settings}))
    return info


def described(picture: GenerateConfig) -> dict[str, Any]:
    """What the file of a picture says of it: every setting that it depends on."""
    return {k: v for k, v in to_tree(picture).items() if k not in CHANGE_NOTHING}


def write_picture(
    path: Place,
    picture: Image.Image,
    settings: Mapping[str, Any],
    counted: str = "",
    *,
    quiet: bool = False,
) -> None:
    """Writes a picture whole or not at all, enlarged if it is small, and prints that it did, unless
    `quiet`; `counted` is added to the line."""
    shown = enlarged(picture)
    with whole_file(path) as file:
        shown.save(file, format="PNG", pnginfo=png_info(settings))
    if quiet:
        return
    factor = shown.width // picture.width
    times = (
        "" if factor == 1 else f" ({picture.width} x {picture.height} px, enlarged {factor} times)"
    )
    print(f"wrote {path}{times}{counted}")


def named_in(out: str, name: str) -> Place:
    """The file of that name in a command's `out`: in the folder, or as NAME-name of NAME.png."""
    path = place(out)
    return path.with_name(f"{path.stem}-{name}") if path.suffix == ".png" else path / name


def difference_in(path: Place, picture: GenerateConfig) -> str | None:
    """How the settings in an existing file differ from those of a picture; None if they agree."""
    try:
        with path.open("rb") as file, Image.open(file) as found:
            there = dict(json.loads(getattr(found, "text", {})[_KEY]))
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return "it is not of generate.py"
    there.pop("taca_jax", None)
    here = json.loads(json.dumps(described(picture)))
    for name in here | there:
        if there.get(name) != here.get(name):
            return (
                f"{name} is {json.dumps(there.get(name))} there, {json.dumps(here.get(name))} here"
            )
    return None


def missing(pictures: list[GenerateConfig]) -> list[GenerateConfig]:
    """The pictures whose files are not there.

    Raises UserError for a file that is there and holds something else.
    """
    absent = []
    for picture in pictures:
        path = place(picture.out)
        if not path.exists():
            absent.append(picture)
        elif why := difference_in(path, picture):
            raise UserError(
                f"{path} is there, and was drawn otherwise: {why}; remove it, or name another out"
            )
    return absent
