"""All families, and which of them a config belongs to.

To add one, add its folder and its line at the end of this file.
"""

from typing import Any

from taca_jax.errors import UserError
from taca_jax.families.base import Family, Published
from taca_jax.families.flux.family import FLUX
from taca_jax.families.flux2.family import FLUX2
from taca_jax.families.sd3.family import SD3
from taca_jax.nn.kinds import kind_of

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Registers a family. Raises ValueError if another family has its name."""
    if _FAMILIES.setdefault(family.name, family) is not family:
        raise ValueError(f"there is a family called {family.name} already")


def families() -> tuple[Family, ...]:
    """Every family, in order of registration."""
    return tuple(_FAMILIES.values())


def family_named(name: str) -> Family:
    """The family of this name. Raises UserError if there is none."""
    if name not in _FAMILIES:
        raise UserError(f"{name} is no family of models; there are {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def family_of(config: Any, where: str = "this model") -> Family:
    """The family of a transformer's config.

    Raises UserError, which names `where`, for a config of any other model.
    """
    name = kind_of(config).name
    if name not in _FAMILIES:
        raise UserError(f"{where} is of kind {name}; expected one of {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def published_models() -> dict[str, tuple[Family, Published]]:
    """Every released model, by the folder name that presets use."""
    return {
        folder: (family, model)
        for family in families()
        for folder, model in family.published.items()
    }


register(FLUX)
register(SD3)
register(FLUX2)
