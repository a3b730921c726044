"""Commands and their options as dataclasses: argparse reads them, and errors are one line each.

The docstring of a command's class says what the command does. Each field is an option, required
where it has no default; the string beneath a field is the option's help.
"""

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from taca_jax.config.command_line import say
from taca_jax.config.fields import (
    describe,
    nearest,
    show,
    tokens_of,
    unknown,
    value_of,
    without_none,
)
from taca_jax.errors import UserError

POSITIONAL = {"positional": True}
"""`field(metadata=POSITIONAL)` is given as a bare value, without `--name` before it."""

_HELP = {"-h", "--help"}


def parse(argv: Sequence[str], commands: Mapping[str, type], *, prog: str, about: str) -> Any:
    """An instance of the class of the command that `argv` begins with, from the words after it.

    An option is `--its-name VALUE` or `--its-name=VALUE`; the elements of a tuple are words of
    their own, or a comma list. `--help` prints help, of the command before it if there is one, and
    exits with status 0. Raises UserError for anything that is not understood.
    """
    if _HELP & set(argv):
        say([_help(commands, argv[0], prog, about)])
        raise SystemExit(0)
    if not argv:
        raise UserError(f"no command given; there are {', '.join(commands)} (--help says more)")
    name, *words = argv
    if name not in commands:
        others = ", ".join(nearest(name, list(commands)))
        raise UserError(f"unknown command {name}; there are {others}")
    return _command(name, commands[name], words)


def _help(commands: Mapping[str, type], name: str, prog: str, about: str) -> str:
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each, command in commands.items():
        doc = inspect.getdoc(command) or ""
        one = parsers.add_parser(
            each,
            help=_escaped(doc.partition("\n\n")[0]),
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_fields(one, command)
        if each == name:
            return one.format_help().rstrip()
    return parser.format_help().rstrip()


def _command(name: str, command: type, words: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    actions = _add_fields(parser, command)
    for action in actions:
        action.required = False  # argparse would name what is missing in words of its own
    options = {flag: action for action in actions for flag in action.option_strings}
    types = get_type_hints(command)
    try:
        found, others = parser.parse_known_args([_with_dashes(word) for word in words])
    except argparse.ArgumentError as error:  # an option without its value
        flag = error.argument_name or ""
        raise UserError(f"{flag}: expected {describe(types[options[flag].dest])}") from None
    if others:
        flag = others[0].partition("=")[0]
        if flag.startswith("--"):
            raise UserError(unknown(flag, list(options), f"option of {name}:"))
        raise UserError(f"{name} has no use for {flag}; options are written --name VALUE")
    given: dict[str, list[str]] = vars(found)
    missing = [_shown(field) for field in _required(command) if field.name not in given]
    if missing:
        raise UserError(f"{name} needs {' and '.join(missing)}")
    values = {}
    for field in dataclasses.fields(command):
        if field.name in given:
            type_, tokens = types[field.name], given[field.name]
            said = " ".join([_shown(field), *tokens])
            if len(tokens) == 1:
                tokens = tokens_of(type_, tokens[0], said)
            values[field.name] = value_of(type_, tokens, said)
    return command(**values)


class _Once(argparse.Action):
    """Stores the words of an option as a list, and refuses an option that is given twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            raise UserError(f"{option_string} is given twice; keep one")
        setattr(namespace, self.dest, [values] if isinstance(values, str) else values)


def _add_fields(parser: argparse.ArgumentParser, command: type) -> list[argparse.Action]:
    """An argument for each field of the command. They take words; values come of them later."""
    types, docs, required = get_type_hints(command), _docs(command), _required(command)
    actions = []
    for field in dataclasses.fields(command):
        type_ = without_none(types[field.name])
        doc = docs.get(field.name, "")
        if field.default not in (None, dataclasses.MISSING):
            doc += f" (default: {show(field.default)})"
        keywords: dict[str, Any] = {
            "action": _Once,
            "default": argparse.SUPPRESS,
            "help": _escaped(doc),
            "metavar": field.name.upper(),
        }
        if get_origin(type_) is Literal:
            keywords["metavar"] = f"{{{','.join(map(str, get_args(type_)))}}}"
        if get_origin(type_) is tuple:
            keywords["nargs"] = "+"
        if _is_positional(field):
            actions.append(parser.add_argument(field.name, **keywords))
        else:
            keywords |= {"dest": field.name, "required": field in required}
            actions.append(parser.add_argument(_shown(field), **keywords))
    return actions


def _docs(command: type) -> dict[str, str]:
    """The strings beneath the fields of a dataclass and of those that it inherits from."""
    docs = {}
    for cls in reversed(command.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, beneath in pairwise(definition.body):
            match field, beneath:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(doc))),
                ):
                    docs[name] = inspect.cleandoc(doc)
    return docs


def _required(command: type) -> list[dataclasses.Field[Any]]:
    missing = dataclasses.MISSING
    return [
        field
        for field in dataclasses.fields(command)
        if field.default is missing and field.default_factory is missing
    ]


def _is_positional(field: dataclasses.Field[Any]) -> bool:
    return field.metadata.get("positional", False)


def _shown(field: dataclasses.Field[Any]) -> str:
    """How a field is named on the command line and in errors."""
    return field.name.upper() if _is_positional(field) else f"--{field.name.replace('_', '-')}"


def _with_dashes(word: str) -> str:
    """`--its_name=VALUE` as `--its-name=VALUE`."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def _escaped(text: str) -> str:
    """Text in which argparse finds nothing to fill in."""
    return text.replace("%", "%%")
