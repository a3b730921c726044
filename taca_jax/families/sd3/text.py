"""How Stable Diffusion 3 reads prompts: with two CLIPs and, if it is present, T5."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from taca_jax.errors import UserError
from taca_jax.families.sd3.model import SD3Config
from taca_jax.nn.conditioning import Conditioning
from taca_jax.text.clip import CLIPConfig, CLIPTextEncoder
from taca_jax.text.encoders import (
    StoredEncoders,
    TextEncoder,
    TextReading,
    check_width,
    split_tokens,
)
from taca_jax.text.t5 import T5Config, T5Encoder


class SD3Text(TextEncoder):
    """CLIP-L, CLIP-bigG and T5.

    Text tokens are the penultimate hidden states of the two CLIPs, concatenated along channels and
    zero-padded to `width`, followed by T5's embeddings; without T5, by `t5_length` tokens of zeros.
    The pooled embedding concatenates both projected embeddings. Padding tokens are not masked.
    Source: diffusers' `StableDiffusion3Pipeline.encode_prompt`.
    """

    def __init__(
        self,
        clip_l: CLIPTextEncoder,
        clip_g: CLIPTextEncoder,
        t5: T5Encoder | None,
        *,
        width: int,
        t5_length: int,
    ):
        self.clip_l = clip_l
        self.clip_g = clip_g
        self.t5 = nnx.data(t5)
        self.width = width
        self.t5_length = t5_length

    @property
    def encoders(self) -> Sequence[nnx.Module]:
        clips = (self.clip_l, self.clip_g)
        return clips if self.t5 is None else (*clips, self.t5)

    def __call__(self, tokens: Int[Array, "b t"]) -> Conditioning:
        """float32 embeddings. The ids are each CLIP's, as many as it has positions, then T5's."""
        first_ids, second_ids, t5_ids = split_tokens(tokens, (self.clip_l, self.clip_g))
        first, second = self.clip_l(first_ids), self.clip_g(second_ids)
        if first.projected is None or second.projected is None:
            raise ValueError("both CLIPs need the projection that Stable Diffusion 3 reads")
        clip = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, self.width - clip.shape[-1])))
        if self.t5 is None:
            t5 = jnp.zeros((len(tokens), self.t5_length, self.width))
        else:
            t5 = self.t5(t5_ids)
        return Conditioning(
            txt=jnp.concatenate([clip, t5], axis=1).astype(jnp.float32),
            pooled=jnp.concatenate([first.projected, second.projected], -1).astype(jnp.float32),
        )

    def embedded(self, marked: Bool[Array, "b t"]) -> Bool[Array, "b n"]:
        first, second, of_t5 = split_tokens(marked, (self.clip_l, self.clip_g))
        if self.t5 is None:
            of_t5 = jnp.zeros((len(marked), self.t5_length), bool)
        return jnp.concatenate([first | second, of_t5], axis=1)


def read_text(config: SD3Config, stored: StoredEncoders) -> TextReading | None:
    """How a transformer reads prompts; None without both CLIPs. T5 is optional.

    CLIP-L is the first CLIP and CLIP-bigG the second. The latter's tokenizer pads with "!", as the
    files in `tokenizer_2/` say; with only a vocabulary and merges it would pad with the end token,
    as transformers does. Raises UserError for encoders whose widths are not those of the
    transformer's inputs, and for too many encoders.
    """
    clips = stored.of_kind(CLIPConfig, "CLIP", most=2)
    t5s = stored.of_kind(T5Config, "T5", most=1)
    if len(clips) < 2:
        return None
    for t5 in t5s.values():
        check_width(t5, config.txt_dim)
    for name, clip in zip(("first", "second"), clips.values(), strict=True):
        if clip.config.projection_dim is None:
            raise UserError(
                f"the {name} CLIP of {stored.where} has no projection, whose embedding Stable "
                "Diffusion 3 reads; take the text encoder of that model"
            )
    pooled = sum(clip.config.projection_dim for clip in clips.values())
    if pooled != config.pooled_dim:
        raise UserError(
            f"the CLIPs of {stored.where} make a pooled embedding of {pooled}, the transformer "
            f"reads {config.pooled_dim}; they are of another model"
        )
    first, second = clips.values()
    both = first.config.dim + second.config.dim
    if both > config.txt_dim:
        raise UserError(
            f"the two CLIPs of {stored.where} are {both} wide together; the transformer reads "
            f"{config.txt_dim}: they are of another model"
        )

    def join(encoders: Sequence[Any], _: int) -> TextEncoder:
        clip_l, clip_g, *rest = encoders
        t5 = rest[0] if rest else None
        return SD3Text(clip_l, clip_g, t5, width=config.txt_dim, t5_length=stored.text_length)

    return TextReading((*clips, *t5s), join, first.config.max_tokens + stored.text_length)
