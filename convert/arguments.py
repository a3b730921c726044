"""A command and its options from a command line, or one clear line.

tyro prints the help; what is wrong it would say in a box.
"""

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_origin, get_type_hints

import tyro

from taca_jax.config.command_line import say
from taca_jax.config.fields import nearest, tokens_of, unknown, value_of
from taca_jax.errors import UserError


def parse(argv: Sequence[str], commands: Mapping[str, type], *, prog: str, about: str) -> Any:
    """The dataclass of the command that `argv` begins with, of the options that follow.

    A field is `--its-name VALUE`, or its value alone where it is annotated as positional; of a
    tuple its values one after another. `--help` prints help and exits with status 0. Raises
    UserError for anything that is not understood.
    """
    if {"-h", "--help"} & set(argv):
        wanted = [word for word in argv[:1] if word in commands]
        say([_help(commands, [*wanted, "--help"], prog, about)])
        raise SystemExit(0)
    if not argv:
        raise UserError(f"no command given; there are {', '.join(commands)} (--help says more)")
    name, *words = argv
    if name not in commands:
        others = ", ".join(nearest(name, list(commands)))
        raise UserError(f"unknown command {name}; there are {others}")
    return _command(name, commands[name], words)


def _help(commands: Mapping[str, type], argv: list[str], prog: str, about: str) -> str:
    union: Any = None
    for name, command in commands.items():
        one: Any = Annotated[command, tyro.conf.subcommand(name)]
        union = one if union is None else union | one
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(union, prog=prog, description=about, args=argv)
    return printed.getvalue().rstrip()


def _command(name: str, command: type, words: list[str]) -> Any:
    hints = get_type_hints(command, include_extras=True)
    positional = [field for field, hint in hints.items() if get_origin(hint) is Annotated]
    options = {_flag(field): field for field in hints if field not in positional}
    given: dict[str, list[str]] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if not word.startswith("--"):
            free = [field for field in positional if field not in given]
            if not free:
                raise UserError(f"{name} has no use for {word}; options are written --name VALUE")
            given[free[0]] = [word]
            continue
        if flag not in options:
            raise UserError(unknown(flag, list(options), f"option of {name}:"))
        if options[flag] in given:
            raise UserError(f"{flag} is given twice; keep one")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        given[options[flag]] = values
    types = get_type_hints(command)
    fields = {
        field: _value(types[field], values, f"{_shown(field, positional)} {' '.join(values)}")
        for field, values in given.items()
    }
    missing = [
        _shown(field.name, positional)
        for field in dataclasses.fields(command)
        if field.default is dataclasses.MISSING and field.name not in fields
    ]
    if missing:
        raise UserError(f"{name} needs {' and '.join(missing)}")
    return command(**fields)


def _value(type_: Any, words: list[str], said: str) -> Any:
    """The value of words, or of the only one, in which commas may part several."""
    tokens = tokens_of(type_, words[0], said) if len(words) == 1 else words
    return value_of(type_, tokens, said)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _shown(field: str, positional: Sequence[str]) -> str:
    return field.upper() if field in positional else _flag(field)
