"""The prompts of an evaluation on shapes: compositions that training shows, and held-out ones."""

from dataclasses import dataclass

from taca_jax.data.shapes.examples import random_prompts

PROMPT_SEED = 0
"""All evaluations use the same prompts, so that models can be compared."""

SEEN, HELD_OUT = "seen", "held-out"

_SPLITS = {SEEN: "train", HELD_OUT: "test"}


@dataclass(frozen=True)
class Half:
    """One half of an evaluation: for each picture its prompt, and the prompt's category."""

    name: str
    categories: tuple[str, ...]
    prompts: tuple[str, ...]


def make_halves(prompts: int, num_images: int = 1) -> tuple[Half, Half]:
    """The seen and the held-out half: up to `prompts` distinct prompts of each category, each for
    `num_images` pictures in a row."""
    seen, held_out = (_half(name, prompts, num_images) for name in (SEEN, HELD_OUT))
    return seen, held_out


def _half(name: str, prompts: int, num_images: int) -> Half:
    drawn = random_prompts(_SPLITS[name], prompts, PROMPT_SEED)
    categories, captions = zip(*(pair for pair in drawn for _ in range(num_images)), strict=True)
    return Half(name, categories, captions)
