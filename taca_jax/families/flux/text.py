"""How FLUX.1 reads prompts: CLIP and T5, or in small models a T5 alone."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from taca_jax.families.flux.model import FluxConfig
from taca_jax.nn.conditioning import Conditioning
from taca_jax.text.clip import CLIPConfig, CLIPTextEncoder
from taca_jax.text.encoders import (
    StoredEncoders,
    T5Text,
    TextEncoder,
    TextReading,
    check_width,
    split_tokens,
)
from taca_jax.text.t5 import T5Config, T5Encoder


class FluxText(TextEncoder):
    """T5's embedding of every token, CLIP's of the whole.

    Source: diffusers' `FluxPipeline.encode_prompt`. T5's padding is not masked; CLIP's pooled
    embedding is that before any projection.
    """

    def __init__(self, clip: CLIPTextEncoder, t5: T5Encoder):
        self.clip = clip
        self.t5 = t5

    @property
    def encoders(self) -> Sequence[nnx.Module]:
        return (self.clip, self.t5)

    def __call__(self, tokens: Int[Array, "b t"]) -> Conditioning:
        """float32 embeddings of ids: first all that CLIP has positions for, then T5's."""
        clip_ids, t5_ids = split_tokens(tokens, (self.clip,))
        return Conditioning(
            txt=self.t5(t5_ids).astype(jnp.float32),
            pooled=self.clip(clip_ids).pooled.astype(jnp.float32),
        )


def read_text(config: FluxConfig, stored: StoredEncoders) -> TextReading | None:
    """How a transformer's prompts are read; None where an encoder is left out.

    That is with CLIP and T5, or with a T5 alone where the transformer's pooled embedding is as wide
    as T5: only small models trained that way are. Raises UserError for encoders of another width
    than the transformer reads, and for too many.
    """
    clips = stored.of_kind(CLIPConfig, "CLIP", most=1)
    t5s = stored.of_kind(T5Config, "T5", most=1)
    if not t5s:
        return None
    ((t5_folder, t5),) = t5s.items()
    if not clips and t5.config.dim != config.pooled_dim:
        return None
    check_width(t5, config.txt_dim)
    if not clips:
        return TextReading((t5_folder,), _t5_alone, stored.text_length)
    ((clip_folder, clip),) = clips.items()
    check_width(clip, config.pooled_dim)
    return TextReading((clip_folder, t5_folder), _both, stored.text_length)


def _t5_alone(encoders: Sequence[Any], pad_id: int) -> TextEncoder:
    (t5,) = encoders
    return T5Text(t5, pad_id=pad_id)


def _both(encoders: Sequence[Any], pad_id: int) -> TextEncoder:
    del pad_id  # padding is not masked
    clip, t5 = encoders
    return FluxText(clip, t5)
