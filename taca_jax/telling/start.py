"""The lines with which a command begins: `what: words`, at most 80 columns wide."""

import textwrap
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.filesize import decimal

from taca_jax.parallel.processes import print_once

WIDTH = 80


def say_fact(what: str, words: str) -> None:
    """Prints `what: words`, in the first process only."""
    print_once(fact(what, words))


def fact(what: str, words: str) -> str:
    """`what: words`, wrapped at 80 columns; what follows the first line is indented. Paths are not
    broken."""
    return wrapped(f"{what}: {words}")


def wrapped(line: str) -> str:
    """A line at most 80 columns wide, or several, indented after the first."""
    return textwrap.fill(
        line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def devices_and_mesh(mesh: Mesh | None) -> str:
    """On which devices a command computes: `8 x TPU v6e, mesh of data 2, context 4`."""
    used = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    kinds = sorted({_kind(device) for device in used})
    said = f"{len(used)} x {' and '.join(kinds)}" if len(used) > 1 else kinds[0]
    axes = [] if mesh is None else [f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1]
    if axes:
        said += f", mesh of {', '.join(axes)}"
    idle = len(jax.devices()) - len(used)
    return f"{said} ({idle} more are not used)" if idle > 0 else said


def _kind(device: Any) -> str:
    return device.device_kind.upper() if device.platform == "cpu" else device.device_kind


def number(count: int) -> str:
    """A number of parameters in three digits: 147 k, 2.65 M, 11.9 B."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def size(count: int) -> str:
    """A number of bytes: 23.8 GB."""
    return decimal(count)


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
