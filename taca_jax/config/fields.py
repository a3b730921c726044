"""Configurations: nested frozen dataclasses, whose fields are listed, parsed and compared.

A field of a configuration is a plain value (int, float, bool, str, Path, a Literal, a tuple of
these, or one of these or None) or again a configuration, then called a group. A field is addressed
by its dotted name (`optimizer.learning_rate`). Its documentation is the line `name: what it is` in
the docstring of its class.
"""

import dataclasses
import difflib
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from taca_jax.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    C = TypeVar("C", bound=DataclassInstance)
else:
    C = TypeVar("C")


class Variants:
    """A base of configuration classes, any of which a field annotated with it may hold.

    In JSON such a field's object says by `kind` which of them it is.
    """

    @classmethod
    def variants(cls) -> Mapping[str, type]:
        """The classes that there are, by kind."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration class.

    name: dotted. annotation: its type. default: the class's, MISSING where there is none. doc: its
    documentation. group: the dataclass that it holds, alone or as `X | None`; None for a plain
    value.
    """

    name: str
    annotation: Any
    default: Any
    doc: str
    group: type | None

    @property
    def optional(self) -> bool:
        """Whether the field may be None."""
        return is_optional(self.annotation)


def fields_of(cls: type, value: Any = None) -> dict[str, Field]:
    """Every field of a configuration class by dotted name, in order, groups before members.

    With a `value` of the class, a field that may hold several classes has the members of the one
    that it holds.
    """
    found = {}
    hints, docs = get_type_hints(cls), _documentation(cls)
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        inside = getattr(value, field.name, None)
        group = _held(group_of(hints[field.name]), inside)
        doc = docs.get(field.name, "")
        found[field.name] = Field(field.name, hints[field.name], default, doc, group)
        if group is not None:
            for name, member in fields_of(group, inside).items():
                dotted = f"{field.name}.{name}"
                found[dotted] = dataclasses.replace(member, name=dotted)
    return found


def update(config: C, values: Mapping[str, str]) -> C:
    """`config` with fields replaced by values given as text: `{"lora.rank": "64"}`.

    values: by dotted name. `none` (in any case) is None where a field may be None; a group that is
    None is made from its defaults when one of its members is given. Tuples are comma lists, or JSON
    lists where an element holds a comma. Each dataclass is rebuilt once, so that values which only
    fit together can be given together. Raises UserError that names the key, the value and what is
    expected.
    """
    return _update(config, type(config), values, "", fields_of(type(config), config))


def create(cls: type[C], values: Mapping[str, str]) -> C:
    """A new configuration of class `cls` from values given as text, as `update` takes them.

    Raises UserError as it does, and for fields without a default that are not given.
    """
    return _update(None, cls, values, "", fields_of(cls))


def difference(a: C, b: C) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations of a class differ: dotted name -> (in a, in b)."""
    differing = {}
    for field in dataclasses.fields(a):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        if type(mine) is type(other) and dataclasses.is_dataclass(mine):
            inside = difference(mine, other)
            differing |= {f"{field.name}.{name}": pair for name, pair in inside.items()}
        elif mine != other:
            differing[field.name] = (mine, other)
    return differing


def nearest(word: str, names: Sequence[str]) -> list[str]:
    """`names`, the most similar to `word` first; of dotted names, the last parts count too."""

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        last = difflib.SequenceMatcher(None, word.split(".")[-1], name.split(".")[-1]).ratio()
        return max(whole, 0.95 * last)

    return sorted(names, key=likeness, reverse=True)


def unknown(key: str, names: Sequence[str], what: str = "key") -> str:
    """The error message for a key that is not among `names`, with the nearest of them."""
    closest = nearest(key, names)[:1]
    hint = f"; did you mean {closest[0]}?" if closest else ""
    return f"unknown {what} {key}{hint}"


def check(right: bool, name: str, value: Any, allowed: str) -> None:
    """Raises UserError, that the field `name` is `value` and must be `allowed`, unless `right`."""
    if not right:
        raise UserError(f"{name} is {value}; it must be {allowed}")


def describe(type_: Any) -> str:
    """What values a type has, in words: `an integer`, `one of step, linear`, ... ."""
    if is_optional(type_):
        return f"{describe(without_none(type_))} or none"
    if get_origin(type_) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(type_))
    if get_origin(type_) is tuple:
        items = get_args(type_)
        if items[-1] is Ellipsis:
            return f"a comma list, each {describe(items[0])}"
        return f"a comma list of {len(items)}: {', '.join(describe(item) for item in items)}"
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
    }
    return words.get(type_, getattr(type_, "__name__", str(type_)))


def without_none(type_: Any) -> Any:
    """`X` of `X | None`; any other type as it is."""
    if not is_optional(type_):
        return type_
    inner = tuple(arg for arg in get_args(type_) if arg is not types.NoneType)
    return inner[0] if len(inner) == 1 else Union[inner]  # noqa: UP007 - built at run time


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        listed = [show(item) for item in value]
        plain = all(
            item and item == item.strip() and not set(item) & set(",[]()") for item in listed
        )
        return ",".join(listed) if plain else json.dumps(listed)
    return str(value)


def tokens_of(type_: Any, text: str, said: str) -> list[str]:
    """The words that `value_of` takes: for a tuple type the elements of a comma or JSON list.

    For another type it is the text alone. Raises UserError that begins with `said`.
    """
    if get_origin(without_none(type_)) is not tuple:
        return [text]
    if text.lstrip().startswith("["):
        try:
            return [_as_text(item) for item in json.loads(text)]
        except json.JSONDecodeError:
            raise UserError(f"{said}: expected {describe(type_)}, or a JSON list") from None
    if text.startswith("(") and text.endswith(")"):  # and not `folder:pictures (2)`
        text = text[1:-1]
    return [item.strip() for item in text.split(",") if item.strip()]


def value_of(type_: Any, tokens: Sequence[str], said: str) -> Any:
    """The value of a plain type (see the module) that is written as `tokens`, one word each.

    A tuple takes a word for each element, any other type exactly one. `none`, in any case, is None
    where the type is optional. Raises UserError that begins with `said`, what the user wrote, for
    words that are no such value.
    """
    if is_optional(type_) and [token.lower() for token in tokens] == ["none"]:
        return None
    present = without_none(type_)
    try:
        if get_origin(present) is tuple:
            kinds = element_types(present, len(tokens))
            return tuple(_from_word(*pair) for pair in zip(kinds, tokens, strict=True))
        (token,) = tokens
        return _from_word(present, token)
    except ValueError:
        raise UserError(f"{said}: expected {describe(type_)}") from None


def _update(
    config: Any, cls: type, values: Mapping[str, str], prefix: str, known: Mapping[str, Field]
) -> Any:
    """`config` (None: a new `cls`) with `values`, whose names lack their common `prefix`.

    known: all fields of the outermost configuration by dotted name.
    """
    changes: dict[str, Any] = {}
    members: dict[str, dict[str, str]] = {}
    for name, text in values.items():
        full, (head, _, rest) = prefix + name, name.partition(".")
        if full not in known:
            raise UserError(unknown(full, list(known)))
        if rest:
            members.setdefault(head, {})[rest] = text
        elif (group := known[full].group) is None:
            expected, said = known[full].annotation, f"{full}={text}"
            changes[head] = value_of(expected, tokens_of(expected, text, said), said)
        elif known[full].optional and text.lower() == "none":
            changes[head] = None
        else:
            inside = ", ".join(f"{full}.{field.name}" for field in dataclasses.fields(group))
            none = f" or {full}=none" if known[full].optional else ""
            raise UserError(f"{full}={text}: {full} is a group; set one of {inside}{none}")
    for head, inside in members.items():
        if head in changes:
            raise UserError(
                f"{prefix}{head}=none and {prefix}{head}.{next(iter(inside))} exclude each other"
            )
        group = known[prefix + head].group
        assert group is not None  # a dotted name in `known` goes through groups only
        current = None if config is None else getattr(config, head)
        if current is None and issubclass(group, Variants):
            raise UserError(
                f"{prefix}{head} is none here, and of several kinds; take a preset with one"
            )
        changes[head] = _update(current, group, inside, f"{prefix}{head}.", known)
    if config is not None:
        return make(lambda: dataclasses.replace(config, **changes), prefix)
    missing = [f"{prefix}{name}" for name in required_fields(cls) if name not in changes]
    if missing:
        why = (
            f"{prefix[:-1]} is none here, so it needs all of its values: add "
            if prefix
            else "give "
        )
        raise UserError(why + ", ".join(missing if prefix else [f"{m}=..." for m in missing]))
    return make(lambda: cls(**changes), prefix)


def _from_word(type_: Any, word: str) -> Any:
    """The value of a type that is neither a tuple nor optional. Raises ValueError."""
    if type_ is bool:
        return chosen((True, False), word.lower(), show)
    if get_origin(type_) is Literal:
        return chosen(get_args(type_), word, str)
    return type_(word)


def chosen(choices: Sequence[Any], word: str, written: Callable[[Any], str]) -> Any:
    """The choice that is written as `word`. Raises ValueError where there is none."""
    return choices[[written(choice) for choice in choices].index(word)]


def element_types(type_: Any, count: int) -> tuple[Any, ...]:
    """The types of a tuple type's elements; of `tuple[X, ...]`, `count` times X."""
    types_ = get_args(type_)
    return types_[:1] * count if types_[-1] is Ellipsis else types_


def make(construct: Callable[[], Any], prefix: str) -> Any:
    """The result of `construct`; a ValueError becomes a UserError that names the group `prefix`."""
    try:
        return construct()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix.rstrip('.')}: {error}" if prefix else str(error)) from None


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def _documentation(cls: type) -> dict[str, str]:
    """The `name: text` lines of the docstrings of a class and its bases, with their indented
    continuation lines."""
    docs: dict[str, str] = {}
    for base in cls.__bases__:
        docs |= {} if base is object else _documentation(base)
    names: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if match := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            names = match[1].split(", ")
            docs |= dict.fromkeys(names, match[2])
        elif line.startswith(" ") and names:
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
        else:
            names = []
    return docs


def required_fields(cls: type) -> list[str]:
    """The names of the fields without a default."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def is_optional(type_: Any) -> bool:
    return get_origin(type_) in (Union, types.UnionType) and types.NoneType in get_args(type_)


def _held(group: type | None, value: Any) -> type | None:
    """The class of a value, where a field may hold several; else the field's."""
    several = group is not None and issubclass(group, Variants) and value is not None
    return type(value) if several else group


def group_of(type_: Any) -> type | None:
    """The dataclass of a type `X` or `X | None`; None for any other type."""
    present = without_none(type_)
    return present if isinstance(present, type) and dataclasses.is_dataclass(present) else None
