"""What visitors may ask for: so many steps and pixels, and LoRA files of one folder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.page.config import PageConfig
from taca_jax.pipelines.config import GenerateConfig, SamplingConfig
from taca_jax.pipelines.lora_choice import LoRAChoice, parse_loras, written_loras
from taca_jax.taca import Gate, Schedule

NO_LORA = "none"


def check_folder(config: PageConfig) -> None:
    """Raises UserError unless the folder of LoRAs is one."""
    if config.lora_folder is not None and not Path(config.lora_folder).is_dir():
        raise UserError(f"lora_folder={config.lora_folder} is no folder; name one, or none")


def offered(config: PageConfig) -> Mapping[str, tuple[LoRAChoice, ...]]:
    """What can be chosen, by the name that the page shows: no LoRA, `lora` as configured, and the
    files that are now in the folder."""
    found: dict[str, tuple[LoRAChoice, ...]] = {NO_LORA: ()}
    if config.lora is not None:
        found[config.lora] = config.lora_choices
    folder = config.lora_folder
    for path in [] if folder is None else sorted(Path(folder).glob("*.safetensors")):
        if path.is_file() and _is_plain(str(path)):
            found[path.name] = (LoRAChoice(str(path)),)
    return found


def _is_plain(path: str) -> bool:
    """Whether a path, written as a choice of LoRAs, means itself, having no sign such as a comma
    of its own."""
    try:
        return parse_loras(path) == (LoRAChoice(path),)
    except UserError:
        return False


def _chosen(config: PageConfig, name: str, strength: float, gate: Gate | None) -> str | None:
    """What a visitor chose, as a command line writes it. `strength` multiplies the files' own;
    without a `gate` they act as they say themselves.

    Raises UserError for a name that is not offered, such as a path.
    """
    there = offered(config)
    if name not in there:
        names = ", ".join(there)
        raise UserError(f"there is no LoRA {name!r} here; choose one of: {names}")
    choices = [
        replace(each, strength=each.strength * strength, gate=gate or each.gate)
        for each in there[name]
    ]
    return written_loras(choices)


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for, as the page's fields hold it; an empty number is None.

    lora: one of the names `offered`. lora_strength: a factor of the files' own. lora_gate: when it
    acts; None is as the file says.
    """

    prompt: str
    seed: float | None
    steps: float | None
    guidance: float | None
    gamma: float | None
    threshold: float | None
    schedule: Schedule
    lora: str
    lora_strength: float | None
    lora_gate: Gate | None
    width: float | None
    height: float | None


def settings_of(config: PageConfig, asked: Asked, max_side: int) -> GenerateConfig:
    """The settings with which generate.py draws what was asked for, with TACA.

    Raises UserError for what cannot be drawn, and for more than visitors may ask for.
    """
    prompt = asked.prompt.strip()
    if not prompt:
        raise UserError("the prompt is empty; say what to draw")
    _check_most("characters of the prompt", len(prompt), config.max_prompt)
    steps, width, height = (_whole(asked, name) for name in ("steps", "width", "height"))
    _check_most("steps", steps, config.max_steps)
    _check_most("pixels a side", max(width, height), max_side)
    assert config.taca is not None  # its class checks that
    given = {field.name: getattr(config, field.name) for field in fields(SamplingConfig)}
    given |= {
        "prompt": prompt,
        "seed": _whole(asked, "seed"),
        "steps": steps,
        "guidance": _number(asked, "guidance"),
        "width": width,
        "height": height,
        "taca": replace(
            config.taca,
            gamma=_number(asked, "gamma"),
            threshold=_number(asked, "threshold"),
            schedule=asked.schedule,
        ),
        "lora": _chosen(config, asked.lora, _number(asked, "lora_strength"), asked.lora_gate),
    }
    return GenerateConfig(**given)


def _check_most(what: str, given: int, most: int) -> None:
    if given > most:
        raise UserError(f"{given} {what}; this page takes up to {most}")


def _whole(asked: Asked, name: str) -> int:
    number = _number(asked, name)
    if number != int(number):
        raise UserError(f"{_shown(name)} is {number:g}; give a whole number")
    return int(number)


def _number(asked: Asked, name: str) -> float:
    number = getattr(asked, name)
    if number is None or not math.isfinite(number):
        raise UserError(f"{_shown(name)} is empty; give a number")
    return float(number)


def _shown(name: str) -> str:
    return name.replace("lora_", "LoRA ")
