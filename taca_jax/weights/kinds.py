"""Every kind of model that a folder may hold."""

from collections.abc import Mapping

import taca_jax.families.registry  # noqa: F401 - registers transformers and what they read
from taca_jax.autoencoders import pixels, tiny_vae
from taca_jax.nn.kinds import ModelKind, known_kinds
from taca_jax.scorers import blip, clip

# No family imports these modules, and importing them registers their kinds.
_AUTOENCODERS = (pixels.PIXELS_KIND, tiny_vae.TINY_VAE_KIND)
_SCORERS = (clip.CLIP_SCORE_KIND, blip.BLIP_KIND)


def model_kinds() -> Mapping[str, ModelKind]:
    """Transformers, text encoders, autoencoders and scorers, by name."""
    return known_kinds()
