"""The command line `PROGRAM --config NAME key=value ...`: a preset with some fields changed.

A program without presets takes `key=value ...` alone.
"""

import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from taca_jax.config.fields import (
    C,
    create,
    describe,
    fields_of,
    required_fields,
    show,
    update,
)
from taca_jax.config.presets import OWN, Presets
from taca_jax.errors import UserError

_WIDTH = 80
_FIELDS = "__dataclass_fields__"


def parse_cli(
    argv: Sequence[str],
    kind: type[C],
    *,
    package: str = "taca_jax.presets",
    attribute: str | None = "CONFIG",
    preset_kind: type | None = None,
    saved: Callable[[Path], Any] | None = None,
    default: str | None = None,
    program: str | None = None,
) -> C:
    """The configuration that the command line `argv` (without the program's name) asks for.

    `--config NAME` takes the preset: the value `attribute` in the module `package.NAME`, of class
    `kind`; or of class `preset_kind`, of which then all is taken that it sets of the fields that it
    shares with `kind`, and which need not be given. Without an `attribute` there are no presets.
    What neither a preset nor the line gives has its default.

    In place of a name, `--config` takes the path of a Python file with such a value, or of a saved
    configuration: a run's folder or the `config.json` in it. saved: reads the latter; by default
    the JSON of a preset.

    Each `key=value` then replaces a field (`lora.rank=64`, `resume=true`, `lora=none`). `--help`
    prints the presets and every key, `--config` without a name the presets; both exit with status
    0. Bad input prints one line, `error: ...`, on stderr and exits with status 2.

    default: the preset where `--config` names none.
    program: how the program is called, for the help; by default the file that runs.
    """
    presets = None
    if attribute is not None:
        required = preset_kind is None
        presets = Presets(package, attribute, preset_kind or kind, required, saved)
    try:
        return _parse(list(argv), kind, presets, default, program or called())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def called() -> str:
    """How this program is called: `python FILE.py`, or the name of an installed command."""
    name = Path(sys.argv[0]).name
    return f"python {name}" if name.endswith(".py") else name


def say(lines: Sequence[str]) -> None:
    """Prints the lines. It is no error if the reader of a pipe, such as `head`, stops reading."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # Python writes the rest of its buffer once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(
    argv: list[str], kind: type[C], presets: Presets | None, default: str | None, program: str
) -> C:
    preset, values = default, {}
    wants_help = False
    rest = iter(argv)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if key in ("-h", "--help"):
            wants_help = True
        elif key == "--config":
            if presets is None:
                raise UserError("--config: this command has no presets; write key=value")
            preset = value if equals else next(rest, "")
            if not preset or preset.startswith("-"):
                say(presets.names())
                raise SystemExit(0)
        elif not equals:
            raise UserError(f"{argument}: expected key=value{_as_assignment(argument)}")
        elif key.startswith("-"):
            raise UserError(f"{argument}: keys have no dashes; write {key.lstrip('-')}={value}")
        elif key in values:
            raise UserError(f"{key} is given twice ({values[key]} and {value}); keep one")
        else:
            values[key] = value
    config = None
    if preset is not None and presets is not None:
        config = _as_kind(presets.load(preset), kind)
    if wants_help:
        say([_help(kind, config, preset, presets, program)])
        raise SystemExit(0)
    if presets is None:
        return create(kind, values)
    if config is not None:
        return update(config, values)
    named = f"--config NAME given; the presets are {', '.join(presets.names())}"
    if presets.required:
        raise UserError(f"no {named}")
    missing = [f"{name}=..." for name in required_fields(kind) if name not in values]
    if missing:
        raise UserError(f"no {', '.join(missing)} and no {named}")
    return create(kind, values)


def _as_kind(preset: Any, kind: type[C]) -> C:
    """The preset, or a `kind` with what the preset sets, other than its class's defaults, of the
    fields of the class from which both derive."""
    if isinstance(preset, kind):
        return preset
    base: Any = next(each for each in kind.__mro__ if isinstance(preset, each))
    shared = {field.name for field in dataclasses.fields(base)}
    values = {
        name: getattr(preset, name)
        for name, field in fields_of(type(preset)).items()
        if name in shared and getattr(preset, name) != field.default
    }
    return kind(**values)


def _as_assignment(argument: str) -> str:
    """A hint for a word without `=`, where it can be a key."""
    name = argument.lstrip("-")
    return f"; write {name}=VALUE" if name.replace(".", "").isidentifier() else ""


ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": "the folder in which compiled programs are kept for the next "
    "start, by default ~/.cache/taca_jax/compiled; `none` keeps none",
    "JAX_PLATFORMS": "the devices to use: `tpu`, `cuda` or `cpu`; by default the fastest there are",
    "XDG_CACHE_HOME": "the folder for what can be made or fetched again, by default ~/.cache: "
    "compiled programs, the shapes data set, copies of files in buckets",
    "HF_HOME": "the folder of the hub's cache and token; HF_HUB_OFFLINE=1 fetches nothing",
}
"""Environment variables that the help names."""


def _help(
    kind: type, config: Any, preset: str | None, presets: Presets | None, program: str
) -> str:
    """The help: usage, presets (None: there are none), and each key with its value, its type and
    its documentation.

    config: the preset whose values are shown; None for the defaults of the class `kind`.
    """
    whose = f"values of {preset}" if preset else "default values; add --config NAME for a preset's"
    if presets is None:
        lines = [f"usage: {program} key=value ...", "", "keys (default values):"]
    else:
        named = "--config NAME" if presets.required else "[--config NAME]"
        lines = [
            f"usage: {program} {named} [key=value ...]",
            "",
            f"presets: {', '.join(presets.names())}",
            f"or, in place of NAME, {OWN}",
            "",
            f"keys ({whose}):",
        ]
    for name, field in fields_of(kind, config).items():
        value = field.default if config is None else _at(config, name, field.default)
        if field.group is not None:
            note = "; none here" if value is None else ""
            switch = f" ({name}=none leaves it out{note})" if field.optional else ""
            lines += ["", *_paragraph(f"  {name}.*{switch}", field.doc)]
        else:
            given = "required" if value is dataclasses.MISSING else f"{name}={show(value)}"
            heading = f"  {given}" if given != "required" else f"  {name}=... (required)"
            lines += _paragraph(f"{heading}  [{describe(field.annotation)}]", field.doc)
    lines += ["", "environment variables:"]
    for name, doc in ENVIRONMENT.items():
        lines += _paragraph(f"  {name}", doc)
    return "\n".join(lines)


def _paragraph(heading: str, doc: str) -> list[str]:
    wrap = partial(textwrap.wrap, width=_WIDTH, break_long_words=False, break_on_hyphens=False)
    indent = " " * 8
    return [
        *wrap(heading, subsequent_indent="    "),
        *wrap(inspect.cleandoc(doc), initial_indent=indent, subsequent_indent=indent),
    ]


def _at(config: Any, name: str, default: Any) -> Any:
    """The value of the field with this dotted name; `default` where a group on the way is None."""
    for part in name.split("."):
        if config is None:
            return default
        config = getattr(config, part)
    return config
