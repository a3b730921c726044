"""Measures how often the pictures of a shapes model show what prompts say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from taca_jax.data.shapes.captions import CATEGORIES
from taca_jax.evaluation.shapes.halves import SEEN, Half
from taca_jax.evaluation.shapes.recogniser import check
from taca_jax.evaluation.shapes.sampler import Sampler
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.grids import caption_grid
from taca_jax.taca import TacaConfig


def variants(
    taca: TacaConfig | None, *, lora: bool, guidances: Sequence[float | None]
) -> list[Variant]:
    """The variants to compare: the base; with `taca` TACA alone; with LoRAs also both, and the
    LoRAs alone. Each at all of `guidances`, of which None is the model's own."""
    ways = [Variant("base", None, 0.0)]
    if taca is not None:
        ways.append(Variant("base + TACA", taca, 0.0))
    if taca is not None and lora:
        ways.append(Variant("TACA + LoRA", taca, 1.0))
        ways.append(Variant("LoRA alone", replace(taca, gamma=1.0, knots=None), 1.0))
    elif lora:  # one that is always on
        ways.append(Variant("base + LoRA", None, 1.0))
    if len(guidances) == 1:
        return [replace(way, guidance=guidances[0]) for way in ways]
    return [
        replace(
            way,
            name=f"guidance {at:g}" if len(ways) == 1 else f"{way.name}, guidance {at:g}",
            guidance=at,
        )
        for at in guidances
        for way in ways
    ]


@dataclass(frozen=True)
class Alignment:
    """What was drawn of one half, by variant, bool [pictures].

    correct: whether the picture shows all that its prompt says. exact: and no other object.
    """

    half: Half
    correct: Mapping[str, np.ndarray]
    exact: Mapping[str, np.ndarray]


def measure(
    sampler: Sampler, which: Sequence[Variant], halves: Sequence[Half]
) -> tuple[list[Alignment], Image.Image]:
    """Draws every prompt in each variant, from the same noise, and scores the pictures.

    Also returns a grid of the first prompt of each category, with a column for each variant.
    """
    alignments, pictures, captions = [], [], []
    for half in halves:
        drawn = {variant.name: sampler.draw(half, variant) for variant in which}
        verdicts = {
            name: [check(*pair) for pair in zip(half.prompts, images, strict=True)]
            for name, images in drawn.items()
        }
        correct = {name: np.array([v.correct for v in of]) for name, of in verdicts.items()}
        exact = {name: np.array([v.exact for v in of]) for name, of in verdicts.items()}
        alignments.append(Alignment(half, correct, exact))
        for i in [half.categories.index(category) for category in CATEGORIES]:
            for name, images in drawn.items():
                pictures.append(Image.fromarray(images[i]))
                sign = "+" if correct[name][i] else "-"
                captions.append(f"{sign} {half.prompts[i]} ({half.name})")
    headings = [variant.name for variant in which]
    return alignments, caption_grid(pictures, captions, columns=len(which), headings=headings)


def best_guidance(alignments: Sequence[Alignment], which: Sequence[Variant]) -> float | None:
    """The guidance of the variant that draws most seen compositions right; of equals the first."""
    seen = next(alignment for alignment in alignments if alignment.half.name == SEEN)
    return max(which, key=lambda variant: seen.correct[variant.name].mean()).guidance
