"""The config.json of original weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taca_jax.config.fields import C
from taca_jax.config.json_text import from_json
from taca_jax.errors import UserError


class Settings:
    """The fields of one config.json; missing or unusable fields raise UserError."""

    def __init__(self, where: Path, fields: Mapping[str, Any]):
        self.where = where
        self.fields = fields

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            raise UserError(f"{self.where} has no field {name}; is it another model's?")
        return self.fields[name]

    def get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def integer(self, name: str) -> int:
        """A field that must be an integer, for use other than passing it to `build`."""
        value = self[name]
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{self.where} says {name} {value!r}; expected an integer")
        return value

    def entries(self, name: str) -> list[Any]:
        """A field that must be a list; empty if it is missing or null."""
        value = self.get(name, [])
        if not isinstance(value, list | tuple):
            raise UserError(f"{self.where} says {name} {value!r}; expected a list")
        return list(value)

    def expect(self, name: str, *allowed: Any) -> None:
        """Raises UserError if the field is present and has none of these values."""
        value = self.fields.get(name)
        if value is not None and value not in allowed:
            listed = " or ".join(repr(each) for each in allowed)
            raise UserError(f"{self.where} says {name} {value!r}; only {listed} is supported")

    def build(self, cls: type[C], values: Mapping[str, Any]) -> C:
        """A config of class `cls` from `values`, each checked against its field's type."""
        return from_json(cls, json.dumps(values), where=str(self.where))


def read_settings(folder: Path, name: str = "config.json") -> Settings:
    """The config.json, or the file `name`, of an original model's folder."""
    file = folder / name
    try:
        fields = json.loads(file.read_text())
    except OSError:
        raise UserError(
            f"{file} is not there; give the folder that holds it beside the weights"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); download it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file} holds no object; download it again")
    return Settings(file, fields)
