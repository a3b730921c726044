"""Configurations as JSON: groups are objects, tuples are lists, and null is None."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from taca_jax.config.fields import (
    C,
    Variants,
    chosen,
    describe,
    element_types,
    group_of,
    is_optional,
    make,
    required_fields,
    unknown,
    without_none,
)
from taca_jax.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def to_json(config: "DataclassInstance") -> str:
    """The configuration as indented JSON; groups are objects, tuples are lists."""
    return json.dumps(to_tree(config), indent=2) + "\n"


def to_tree(config: Any) -> dict[str, Any]:
    """The configuration as `to_json` has it, for other JSON; a field that may hold several
    classes says its kind."""
    tree = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inside = to_tree(value)
            if isinstance(value, Variants):
                kinds = value.variants().items()
                inside = {"kind": next(k for k, cls in kinds if cls is type(value)), **inside}
            value = inside
        tree[field.name] = value
    return tree


def from_json(cls: type[C], text: str, where: str = "the configuration") -> C:
    """The configuration of class `cls` that `to_json` wrote as `text`, validated again.

    null is None and a string is text, the string "none" too. where: names the source in errors.
    Raises UserError for text that is not JSON, and for unknown, missing or mistyped fields.
    """
    try:
        return _from_tree(cls, json.loads(text), "")
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}); write it again") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _from_tree(cls: type, tree: Any, prefix: str) -> Any:
    """The configuration of class `cls` from parsed JSON; its dotted names begin with `prefix`."""
    if not isinstance(tree, dict):
        raise UserError(f"{prefix[:-1] or 'the whole'} is {tree!r}; expected an object")
    if issubclass(cls, Variants) and prefix:
        kinds, kind = cls.variants(), tree.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(f"{prefix}kind is {kind!r}; expected one of {', '.join(kinds)}")
        inside = {name: value for name, value in tree.items() if name != "kind"}
        return _from_tree_of(kinds[kind], inside, prefix)
    return _from_tree_of(cls, tree, prefix)


def _from_tree_of(cls: type, tree: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in tree:
        if key not in names:
            raise UserError(unknown(prefix + key, [prefix + name for name in names]))
    missing = [prefix + name for name in required_fields(cls) if name not in tree]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; add what was removed")
    values = {}
    for name, value in tree.items():
        group, full = group_of(hints[name]), prefix + name
        if group is not None and not (value is None and is_optional(hints[name])):
            values[name] = _from_tree(group, value, f"{full}.")
        else:
            try:
                values[name] = _from_json_value(hints[name], value)
            except ValueError:
                raise UserError(
                    f"{full}={json.dumps(value)}: expected {describe(hints[name])}"
                ) from None
    return make(lambda: cls(**values), prefix)


def _from_json_value(type_: Any, value: Any) -> Any:
    """The value of a plain type from JSON, where null alone is None. Raises ValueError."""
    if value is None and is_optional(type_):
        return None
    present = without_none(type_)
    if get_origin(present) is tuple and isinstance(value, list):
        kinds = element_types(present, len(value))
        return tuple(_from_json_value(*pair) for pair in zip(kinds, value, strict=True))
    if get_origin(present) is Literal:
        return chosen(get_args(present), json.dumps(value), json.dumps)
    if present is float and type(value) is int:
        return float(value)
    if present is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not present:
        raise ValueError
    return value
