"""Which LoRA files are used, how strongly and when, as it is written on a command line."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from taca_jax.errors import UserError
from taca_jax.taca import Gate

FORM = "FILE, FILE:STRENGTH, FILE@taca or FILE@always (or both: FILE@taca:0.8), joined by commas"
"""How LoRAs are written."""

_DIGITS = ".12g"
"""Of a strength that is written: products such as 3 x 0.1 are without their last bits."""

_ONE = re.compile(
    rf"(?P<path>.+?)(@(?P<gate>{'|'.join(get_args(Gate))}))?(:(?P<strength>[-+.\deE]+|nan|[-+]?inf))?"
)


@dataclass(frozen=True)
class LoRAChoice:
    """A LoRA to use. path: of its file, or the name of one that comes with the package. strength:
    a factor of what its file says. gate: when it acts; None is as its file says, else always.

    Raises UserError for a strength that is not finite.
    """

    path: str
    strength: float = 1.0
    gate: Gate | None = None

    def __post_init__(self):
        if not math.isfinite(self.strength):
            raise UserError(f"the strength of LoRA {self.path} is {self.strength}; give a number")


def written_loras(choices: Sequence[LoRAChoice]) -> str | None:
    """The text that `parse_loras` reads these from; None for no LoRA."""
    return ",".join(map(_written, choices)) or None


def parse_loras(text: str) -> tuple[LoRAChoice, ...]:
    """The LoRAs that a text asks for, such as `style.safetensors:0.8,taca.safetensors@taca`.

    Raises UserError where it is not of the form FORM, or names a file twice.
    """
    found: dict[str, LoRAChoice] = {}
    for part in text.split(","):
        match = _ONE.fullmatch(part.strip())
        if match is None:
            raise UserError(f"lora={text or 'empty'}: expected {FORM}")
        gate = next((gate for gate in get_args(Gate) if gate == match["gate"]), None)
        try:
            strength = float(match["strength"] or 1)
        except ValueError:
            raise UserError(
                f"lora={text}: the strength {match['strength']} is no number; expected {FORM}"
            ) from None
        if match["path"] in found:
            raise UserError(f"lora={text} names {match['path']} twice; add up its strengths")
        found[match["path"]] = LoRAChoice(match["path"], strength, gate)
    return tuple(found.values())


def _written(choice: LoRAChoice) -> str:
    gate = "" if choice.gate is None else f"@{choice.gate}"
    return f"{choice.path}{gate}:{choice.strength:{_DIGITS}}"
