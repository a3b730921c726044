"""The families that there are, and which of them a config is of.

To add one, add its folder and its line at the end of this file.
"""

from collections.abc import Mapping
from typing import Any

from taca_jax.autoencoders import pixels, tiny_vae
from taca_jax.errors import UserError
from taca_jax.families.base import Family, Published
from taca_jax.families.flux.family import FLUX
from taca_jax.families.sd3.family import SD3
from taca_jax.nn.kinds import ModelKind, kind_of, known_kinds

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known. Raises ValueError where there is another of its name."""
    if _FAMILIES.setdefault(family.name, family) is not family:
        raise ValueError(f"there is a family called {family.name} already")


def families() -> tuple[Family, ...]:
    """Every family, in the order of their registration."""
    return tuple(_FAMILIES.values())


def family_named(name: str) -> Family:
    """The family that commands call so. Raises UserError for a name that is none."""
    if name not in _FAMILIES:
        raise UserError(f"{name} is no family of models; there are {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def family_of(config: Any, where: str = "this model") -> Family:
    """The family of a transformer's config.

    Raises UserError for a config of anything else; `where` names it.
    """
    name = kind_of(config).name
    if name not in _FAMILIES:
        raise UserError(f"{where} is of kind {name}; expected one of {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def published_models() -> dict[str, tuple[Family, Published]]:
    """Every released model, by the folder that presets expect it in."""
    return {
        folder: (family, model)
        for family in families()
        for folder, model in family.published.items()
    }


def model_kinds() -> Mapping[str, ModelKind]:
    """Every kind of model that a folder may hold: transformers, text encoders, autoencoders."""
    return known_kinds()


# What no family's folder imports makes its kind known when it is imported here.
_AUTOENCODERS = (pixels.PIXELS_KIND, tiny_vae.TINY_VAE_KIND)

register(FLUX)
register(SD3)
