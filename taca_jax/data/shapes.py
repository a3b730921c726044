"""The shapes data set: small pictures of coloured, textured shapes with captions."""

from taca_jax.data.shapes_captions import CATEGORIES, MAX_TOKENS, VOCABULARY, parse_caption
from taca_jax.data.shapes_drawing import IMAGE_SIZE
from taca_jax.data.shapes_examples import SPLITS, Example, GeneratedShapes, test_prompts

__all__ = [
    "CATEGORIES",
    "IMAGE_SIZE",
    "MAX_TOKENS",
    "SPLITS",
    "VOCABULARY",
    "Example",
    "GeneratedShapes",
    "parse_caption",
    "test_prompts",
]
