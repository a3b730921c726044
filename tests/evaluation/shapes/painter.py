"""A stand-in for a pipeline that draws shapes."""

from random import Random
from types import SimpleNamespace

import numpy as np

from taca_jax.data.shapes.captions import parse_caption
from taca_jax.data.shapes.drawing import draw, place
from taca_jax.data.shapes.examples import _complete


class Painter:
    """Draws `paint(prompt, options)`, where options are those of the call; remembers its calls."""

    settings = SimpleNamespace(guidance=1.5)

    def __init__(self, paint):
        self.paint = paint
        self.calls = []

    def __call__(self, prompts, **options):
        self.calls.append((tuple(prompts), options))
        pictures = np.stack([self.paint(prompt, options) for prompt in prompts])
        return SimpleNamespace(images=pictures.astype(np.float32) / 255)


def right(prompt, options):
    del options
    return picture_of(prompt)


def grey(prompt, options):
    del prompt, options
    return np.full((40, 40, 3), 216, np.uint8)


def picture_of(prompt):
    """uint8 [40, 40, 3]: what the prompt says, and nothing else."""
    description, random = parse_caption(prompt), Random(0)
    return draw(place(_complete(description, random), description.relation, random))
