"""How FLUX.1 reads prompts: with CLIP and T5, or in small models with T5 alone."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

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
    """T5's embedding of every token, CLIP's embedding of the whole prompt.

    T5's padding is not masked; CLIP's pooled embedding is taken before any projection. Source:
    diffusers' `FluxPipeline.encode_prompt`.
    """

    def __init__(self, clip: CLIPTextEncoder, t5: T5Encoder):
        self.clip = clip
        self.t5 = t5

    @property
    def encoders(self) -> Sequence[nnx.Module]:
        return (self.clip, self.t5)

    def __call__(self, tokens: Int[Array, "b t"]) -> Conditioning:
        """float32 embeddings. The ids are CLIP's, as many as it has positions, then T5's."""
        clip_ids, t5_ids = split_tokens(tokens, (self.clip,))
        return Conditioning(
            txt=self.t5(t5_ids).astype(jnp.float32),
            pooled=self.clip(clip_ids).pooled.astype(jnp.float32),
        )

    def embedded(self, marked: Bool[Array, "b t"]) -> Bool[Array, "b n"]:
        _, of_t5 = split_tokens(marked, (self.clip,))
        return of_t5


def read_text(config: FluxConfig, stored: StoredEncoders) -> TextReading | None:
    """How a transformer reads prompts; None if an encoder that it needs is not present.

    Prompts are read with CLIP and T5, or with T5 alone if the transformer's pooled embedding is as
    wide as T5's, which is so only in small models trained that way. Raises UserError for encoders
    of another width than the transformer's inputs, and for too many encoders.
    """
    clips = stored.of_kind(CLIPConfig, "CLIP", most=1)
    t5s = stored.of_kind(T5Config, "T5", most=1)
    if not t5s:
        return None
    ((t5_folder, t5),), length = t5s.items(), stored.text_length
    if not clips and t5.config.dim != config.pooled_dim:
        return None
    check_width(t5, config.txt_dim)
    if not clips:
        return TextReading(
            (t5_folder,), lambda encoders, pad_id: T5Text(*encoders, pad_id=pad_id), length
        )
    ((clip_folder, clip),) = clips.items()
    check_width(clip, config.pooled_dim)
    return TextReading((clip_folder, t5_folder), lambda encoders, _: FluxText(*encoders), length)
