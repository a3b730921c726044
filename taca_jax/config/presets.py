"""Presets: configurations by name, from a file of one's own, or as a run saved its own."""

import dataclasses
import importlib
import pkgutil
import runpy
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taca_jax.config.fields import nearest
from taca_jax.config.json_text import from_json
from taca_jax.errors import UserError

PURPOSES = {"CONFIG": "trains", "GENERATE": "draws"}
"""What presets are for in this repository's modules, by the attribute that holds them."""

RECORD = "config.json"
"""The configuration in a run's folder."""

OWN = f"FILE.py (yours), a run's folder or its {RECORD}"
"""What may stand in the place of a name."""


@dataclasses.dataclass(frozen=True)
class Presets:
    """The values called `attribute`, of class `kind`, in the modules of a package or in a file.

    required: whether a command line must name one. saved: reads a saved configuration, a JSON file;
    by default that of a `kind`.
    """

    package: str
    attribute: str
    kind: type
    required: bool
    saved: Callable[[Path], Any] | None = None

    def names(self) -> list[str]:
        """The names of the modules that have one."""
        return [name for name in self._modules() if isinstance(self._value(name), self.kind)]

    def load(self, name: str) -> Any:
        """The preset of that name, of the Python file there, or saved in the folder or file there.

        Raises UserError that names the others where there is none, and that says where in a file
        what is wrong.
        """
        presets = self.names()
        if name in presets:
            return self._value(name)
        path = Path(name)
        if path.suffix in (".py", ".json") or len(path.parts) > 1 or path.is_dir():
            return self._from_path(path)
        problem = f"unknown preset {name}"
        if name in self._modules():
            problem = self._other_purpose(f"the preset {name}", vars(self._module(name))) or problem
        raise UserError(f"{problem}; there are {', '.join(nearest(name, presets))}")

    def _from_path(self, path: Path) -> Any:
        if path.is_dir() and not (path / RECORD).is_file():
            raise UserError(f"{path} has no {RECORD}, as a run's folder has; give {OWN}")
        if path.is_dir() or path.suffix == ".json":
            file = path / RECORD if path.is_dir() else path
            if not file.is_file():
                raise UserError(f"{file} is not there; give {OWN}, or a preset's name (--config)")
            return self._from_record(file)
        if not path.is_file():
            raise UserError(f"{path} is not there; give {OWN}, or a preset's name (--config)")
        if path.suffix != ".py":
            raise UserError(f"{path} is no preset; give {OWN}")
        return self._from_python(path)

    def _from_record(self, file: Path) -> Any:
        if self.saved is not None:
            return self.saved(file)
        return from_json(self.kind, read_record(file), str(file))

    def _from_python(self, file: Path) -> Any:
        values = _run(file)
        example = f"{self.attribute} = {self.kind.__name__}(...)"
        if self.attribute not in values:
            other = self._other_purpose(str(file), values)
            raise UserError(f"{other or f'{file} has no {self.attribute}'}; add {example}")
        value = values[self.attribute]
        if not isinstance(value, self.kind):
            raise UserError(
                f"{file}: {self.attribute} is of class {type(value).__name__}; expected {example}"
            )
        return value

    @staticmethod
    def _other_purpose(whose: str, values: dict[str, Any]) -> str | None:
        """What a module with these values is for instead, in words."""
        purposes = [use for each, use in PURPOSES.items() if values.get(each) is not None]
        return f"{whose} only {' and '.join(purposes)}" if purposes else None

    def _modules(self) -> list[str]:
        path = importlib.import_module(self.package).__path__
        return [module.name for module in pkgutil.iter_modules(path)]

    def _module(self, name: str) -> types.ModuleType:
        return importlib.import_module(f"{self.package}.{name}")

    def _value(self, name: str) -> Any:
        return getattr(self._module(name), self.attribute, None)


def read_record(file: Path) -> str:
    """The text of a saved configuration. Raises UserError if it cannot be read."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); expected a run's {RECORD}") from None


def _run(file: Path) -> dict[str, Any]:
    """The global names of a Python file that is run. Raises UserError with the line that fails."""
    try:
        return runpy.run_path(str(file))
    except UserError as error:
        raise UserError(f"{_place(file, error)}: {error}") from None
    except SyntaxError as error:
        where = f"{error.filename or file}, line {error.lineno}" if error.lineno else str(file)
        raise UserError(f"{where}: {error.msg}; it must be Python") from None
    except Exception as error:  # whatever a user's file may raise is for the user to mend
        raise UserError(f"{_place(file, error)}: {type(error).__name__}: {error}") from None


def _place(file: Path, error: Exception) -> str:
    """The file, and the line of it that led to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return f"{file}, line {lines[-1]}" if lines else str(file)
