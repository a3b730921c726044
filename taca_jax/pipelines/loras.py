"""The LoRAs of a pipeline: several files on one transformer, each with its strength and gate."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import open_tensors
from taca_jax.hub.ids import hint
from taca_jax.nn.lora import AttachedLoRA, count_loras, drop_lora
from taca_jax.pipelines.config import SamplingConfig
from taca_jax.pipelines.lora_choice import FORM, LoRAChoice, parse_loras
from taca_jax.taca import Gate
from taca_jax.weights.headers import headers_alone
from taca_jax.weights.hub_files import lora_files
from taca_jax.weights.lora_files import (
    LoRAFile,
    append_lora_file,
    check_lora_file,
    gate_in,
    open_lora,
)
from taca_jax.weights.pipeline_folders import StoredPipeline
from taca_jax.weights.shipped import find_weights, is_far

LoRAs = str | Path | LoRAChoice | Sequence[str | Path | LoRAChoice]
"""LoRA files in Python: a text is read as on a command line, a Path is taken as it is."""


def choices_of(loras: LoRAs, strength: float, gate: Gate | None) -> list[LoRAChoice]:
    """The LoRAs that are asked for; `strength` is a factor of each one's, `gate` that of those
    without their own."""
    given = [loras] if isinstance(loras, str | Path | LoRAChoice) else loras
    choices: list[LoRAChoice] = []
    for each in given:
        if isinstance(each, str):
            choices += parse_loras(each)
        else:
            choices.append(each if isinstance(each, LoRAChoice) else LoRAChoice(str(each)))
    return [
        replace(choice, strength=choice.strength * strength, gate=choice.gate or gate)
        for choice in choices
    ]


def attach_loras(
    transformer: Any,
    attached: Sequence[AttachedLoRA],
    choices: Sequence[LoRAChoice],
    mesh: Mesh | None,
) -> tuple[tuple[AttachedLoRA, ...], list[str]]:
    """Attaches files to a transformer, after those `attached`; one that is attached is replaced.

    Returns all that are attached then, and a line about each new one. Raises UserError for a file
    that is damaged or made for another model; the transformer is then unchanged.
    """
    files = [open_lora(find_weights(choice.path, lora_files), transformer) for choice in choices]
    lines = []
    for choice, file in zip(choices, files, strict=True):
        attached = detach_lora(transformer, attached, choice.path)
        append_lora_file(file, transformer, mesh)
        acting = AttachedLoRA(choice.path, choice.strength, choice.gate or file.gate or "always")
        attached = (*attached, acting)
        lines.append(_line(choice, file, acting))
    return tuple(attached), lines


def detach_lora(
    transformer: Any, attached: Sequence[AttachedLoRA], path: str | Path
) -> tuple[AttachedLoRA, ...]:
    """Removes the LoRA of a file, if it is attached; returns those that are attached then."""
    left = without(attached, path)
    for i, lora in enumerate(attached):
        if lora not in left:
            drop_lora(transformer, i)
    return left


def without(attached: Sequence[AttachedLoRA], path: str | Path) -> tuple[AttachedLoRA, ...]:
    """Those of the attached LoRAs that are not of this file."""
    wanted = find_weights(path, lora_files).resolve()
    return tuple(
        lora for lora in attached if find_weights(lora.name, lora_files).resolve() != wanted
    )


def acting_loras(
    transformer: Any, attached: Sequence[AttachedLoRA], strength: float | Sequence[float]
) -> tuple[AttachedLoRA, ...]:
    """The attached LoRAs with their strengths multiplied by one number, or by one for each.

    Raises UserError for another number of strengths, and for LoRAs that were attached to the
    transformer in another way.
    """
    factors = [*strength] if isinstance(strength, Sequence) else [strength] * len(attached)
    if len(factors) != len(attached):
        names = ", ".join(lora.name for lora in attached) or "none"
        raise UserError(
            f"{len(factors)} values of lora_strength for {len(attached)} LoRAs ({names}); give one "
            "for all, or one for each"
        )
    if (count := count_loras(transformer)) != len(attached):
        raise UserError(
            f"the transformer has factors of {count} LoRAs, {len(attached)} of them loaded by this "
            "pipeline; load all with load_lora"
        )
    return tuple(
        replace(lora, strength=lora.strength * factor)
        for lora, factor in zip(attached, factors, strict=True)
    )


def used_loras(config: SamplingConfig) -> tuple[LoRAChoice, ...]:
    """The configured LoRAs that act: without TACA those that are not gated with it.

    Raises UserError where that stands in a file which cannot be read.
    """
    return tuple(choice for choice in config.lora_choices if _acts(choice, config))


def _acts(choice: LoRAChoice, config: SamplingConfig) -> bool:
    return config.taca is not None or gate_of(choice) != "taca"


def _may_act(config: SamplingConfig) -> list[LoRAChoice]:
    """The configured LoRAs that act as far as the command says, without their files."""
    return [each for each in config.lora_choices if config.taca is not None or each.gate != "taca"]


def gate_of(choice: LoRAChoice) -> Gate:
    """When a LoRA acts. Raises UserError if only its file says that, and cannot be read."""
    if choice.gate is not None:
        return choice.gate
    return gate_in(open_tensors(_found(choice))) or "always"


def check_lora(config: SamplingConfig) -> None:
    """Raises UserError unless each LoRA that is used is a readable file, as far as this machine has
    them: neither the hub nor a bucket is asked."""
    for choice in _may_act(config):
        if not is_far(choice.path, lora_files) and _acts(choice, config):
            open_tensors(_found(choice))


def check_loras_fit(config: SamplingConfig, stored: StoredPipeline) -> None:
    """Raises UserError unless each LoRA that is used is a whole file and of this model, as far as
    its header shows: no more is read of the hub and of buckets."""
    for choice in _may_act(config):
        with headers_alone(choice.path, lora_files) as path:
            seen = replace(choice, path=path)
            if _acts(seen, config):
                check_lora_file(_found(seen), stored.family, stored.transformer.config)


def fetch_loras(config: SamplingConfig) -> None:
    """Fetches those LoRAs that are used and not on this machine. Raises UserError where one cannot
    be had."""
    for choice in _may_act(config):
        find_weights(choice.path, lora_files)


def _found(choice: LoRAChoice) -> Path:
    found = find_weights(choice.path, lora_files)
    if not found.exists():
        form = f" (a LoRA is {FORM})" if {"@", ":"} & {*choice.path} else ""
        raise UserError(
            f"lora={choice.path} is not there; train it, name another file, or set lora=none to "
            f"draw without one{form}; {hint(choice.path)}"
        )
    return found


def _line(choice: LoRAChoice, file: LoRAFile, acting: AttachedLoRA) -> str:
    when = "with TACA" if acting.gate == "taca" else "always on"
    said = f"{Path(choice.path).name}: {file.summary.brief}; used at {acting.strength:g}, {when}"
    if choice.gate is None and file.gate is None:
        said += f", as the file does not say when ({choice.path}@taca if it is TACA's)"
    return said
