"""Sweeps: settings of TACA, LoRAs and guidance, each to be compared with the plain base."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any, Literal

from taca_jax.config.fields import check, show
from taca_jax.config.json_text import from_json
from taca_jax.errors import UserError
from taca_jax.pipelines.config import SamplingConfig
from taca_jax.taca import Schedule, TacaConfig

AXES = ("gammas", "thresholds", "schedules", "cond_only", "loras", "gammas_learned", "guidances")
"""The fields of AxesConfig that hold the values of an axis."""

EACH_ALONE = "intervals and p-values are of each setting alone, not corrected for their number"
"""What a reader of many settings must know."""


def check_guidances(name: str, guidances: tuple[float, ...]) -> None:
    """Raises UserError for values of this field that are out of range, or given twice."""
    for guidance in guidances:
        check(0 <= guidance < math.inf, name, guidance, "0 or more each")
    check(len(set(guidances)) == len(guidances), name, show(guidances), "distinct numbers")


@dataclass(frozen=True)
class AxesConfig(SamplingConfig):
    """Many settings of TACA compared: the same prompts, drawn from the same noise.

    The center is the settings of `taca`, `lora` and `guidance`; an axis that is empty stays there.

    gammas: values of taca.gamma, each instead of the center's knots if it has any.
    thresholds: values of taca.threshold.
    schedules: values of taca.schedule, each instead of the center's knots if it has any.
    cond_only: values of taca.cond_only; at guidance of at most 1 all of them are the same.
    loras: LoRA files, one for each setting (as `lora`, which may name several at once); `none` is
      the base alone.
    gammas_learned: files `taca.json` of runs with gamma_knots; each is one more setting.
    guidances: strengths of guidance; each setting is compared with the plain base at its own.
    vary: `each` changes one axis at a time, `all` combines all values of all axes.

    Raises UserError for values out of range, and for thresholds or schedules around a center with
    first_steps, which has no use for them.
    """

    gammas: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    cond_only: tuple[bool, ...] = ()
    loras: tuple[str, ...] = ()
    gammas_learned: tuple[str, ...] = ()
    guidances: tuple[float, ...] = ()
    vary: Literal["each", "all"] = "each"

    def __post_init__(self):
        super().__post_init__()
        if self.taca is None:
            raise UserError("taca is none; it must be the center of the sweep; set taca.gamma")
        for name in ("thresholds", "schedules"):
            if self.taca.first_steps is not None and (values := getattr(self, name)):
                raise UserError(
                    f"{name}={show(values)} does nothing with taca.first_steps="
                    f"{self.taca.first_steps}; leave one of the two out"
                )
        check_guidances("guidances", self.guidances)


@dataclass(frozen=True)
class Setting:
    """One point of a sweep. taca: None for the plain base, which has no LoRA either."""

    taca: TacaConfig | None
    lora: str | None
    guidance: float | None

    @property
    def name(self) -> str:
        """All that distinguishes it from others, in words."""
        taca = self.taca
        if taca is None:
            words = ["base"]
        elif taca.knots is not None:
            words = [f"gamma {' '.join(map(_said, taca.knots))}"]
        elif taca.gamma == 1 or taca.first_steps is not None:
            words = [f"gamma {_said(taca.gamma)}"]
        else:
            words = [f"gamma {_said(taca.gamma)}", taca.schedule]
        if taca is not None:
            first = taca.first_steps
            acts = f"t >= {_said(taca.threshold)}" if first is None else f"first {first} steps"
            words += [acts, *(["conditional half"] if taca.cond_only else [])]
            words.append("no LoRA" if self.lora is None else f"LoRA {self.lora}")
        words += [] if self.guidance is None else [f"guidance {_said(self.guidance)}"]
        return ", ".join(words)


def _said(number: float) -> str:
    """The number in the fewest digits that distinguish it from all others."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def settings(config: AxesConfig, own_guidance: float) -> list[Setting]:
    """The points of a sweep, those of a guidance together, the plain base first in each; their
    names are distinct.

    Settings that are the same attention are drawn once: gamma 1 has no schedule, with no LoRA it is
    the base, and at guidance of at most 1 there is no unconditional half. own_guidance: the
    model's, where none is configured. Raises UserError for a file of gammas_learned that cannot be
    read.
    """
    taca = config.taca
    assert taca is not None  # AxesConfig refuses none
    center = Setting(taca, config.lora, config.guidance)
    axes = _axes(config)
    if config.vary == "each":
        points = [center, *(change(center) for axis in axes for change in axis)]
    else:
        combined = product(*(axis or [lambda point: point] for axis in axes))
        points = [reduce(lambda point, change: change(point), each, center) for each in combined]
    points += [
        replace(center, taca=_learned(Path(file)), lora=lora)
        for file in config.gammas_learned
        for lora in dict.fromkeys((None, config.lora))
    ]
    by_guidance: dict[float | None, dict[Setting, None]] = {}
    for point in points:
        point = _simplest(point, own_guidance)
        group = by_guidance.setdefault(point.guidance, {})
        group.setdefault(Setting(None, None, point.guidance))
        group.setdefault(point)
    return [point for group in by_guidance.values() for point in group]


def _axes(config: AxesConfig) -> list[list[Callable[[Setting], Setting]]]:
    """What each value of each axis changes of a point."""

    def of_taca(**values: Any) -> Callable[[Setting], Setting]:
        def change(point: Setting) -> Setting:
            assert point.taca is not None  # the center's is not
            return replace(point, taca=replace(point.taca, **values))

        return change

    def of_point(**values: Any) -> Callable[[Setting], Setting]:
        return lambda point: replace(point, **values)

    return [
        [of_taca(gamma=gamma, knots=None) for gamma in config.gammas],
        [of_taca(threshold=threshold) for threshold in config.thresholds],
        [of_taca(schedule=schedule, knots=None) for schedule in config.schedules],
        [of_taca(cond_only=cond_only) for cond_only in config.cond_only],
        [of_point(lora=None if lora == "none" else lora) for lora in config.loras],
        [of_point(guidance=guidance) for guidance in config.guidances],
    ]


def _simplest(point: Setting, own_guidance: float) -> Setting:
    """The same attention with defaults in place of what does nothing: TACA at gamma 1 alone, the
    schedule of gamma 1, what knots and first_steps replace, and cond_only where there is no
    unconditional half."""
    taca = point.taca
    if taca is None:
        return point
    plain = taca.gamma == 1 and taca.knots is None
    if plain and point.lora is None:
        return Setting(None, None, point.guidance)
    if plain or taca.knots is not None or taca.first_steps is not None:
        taca = replace(taca, schedule="step")
    if taca.first_steps is not None:
        taca = replace(taca, threshold=TacaConfig.threshold)
    if taca.knots is not None:
        taca = replace(taca, gamma=TacaConfig.gamma)
    if plain or (own_guidance if point.guidance is None else point.guidance) <= 1:
        taca = replace(taca, cond_only=False)
    return replace(point, taca=taca)


def _learned(file: Path) -> TacaConfig:
    try:
        return from_json(TacaConfig, file.read_text(), str(file))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); train with gamma_knots"
        ) from None


def loras_of(points: Sequence[Setting]) -> list[str]:
    """The LoRAs of the settings, each once."""
    return [*dict.fromkeys(point.lora for point in points if point.lora is not None)]
