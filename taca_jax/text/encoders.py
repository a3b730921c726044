"""Token ids to what the transformer is told of a prompt, as each family of models reads it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from taca_jax.errors import UserError
from taca_jax.nn.conditioning import Conditioning
from taca_jax.text.clip import CLIPTextEncoder
from taca_jax.text.t5 import T5Encoder


class FluxText(nnx.Module):
    """CLIP and T5 as FLUX.1 reads prompts: T5's embedding of every token, CLIP's of the whole.

    Source: diffusers' `FluxPipeline.encode_prompt`. T5's padding is not masked; CLIP's pooled
    embedding is that before any projection.
    """

    def __init__(self, clip: CLIPTextEncoder, t5: T5Encoder):
        self.clip = clip
        self.t5 = t5

    def __call__(self, tokens: Int[Array, "b t"]) -> Conditioning:
        """float32 embeddings of ids: first all that CLIP has positions for, then T5's."""
        clip_ids, t5_ids = _split(tokens, (self.clip,))
        return Conditioning(
            txt=self.t5(t5_ids).astype(jnp.float32),
            pooled=self.clip(clip_ids).pooled.astype(jnp.float32),
        )


class SD3Text(nnx.Module):
    """CLIP-L, CLIP-bigG and T5 as Stable Diffusion 3 reads prompts.

    The two CLIPs' penultimate hidden states side by side, with zeros up to T5's width, then T5's
    embeddings as further tokens; pooled are both projected embeddings side by side. Nothing is
    masked. Without a T5, `t5_length` tokens of zeros of `width` stand for its embeddings.
    Source: diffusers' `StableDiffusion3Pipeline.encode_prompt`.

    Raises UserError for a CLIP without projection, and for widths that do not fit.
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
        for name, clip in (("first", clip_l), ("second", clip_g)):
            if clip.config.projection_dim is None:
                raise UserError(
                    f"the {name} CLIP has no projection, whose embedding Stable Diffusion 3 reads; "
                    "take the text encoder of that model"
                )
        both = clip_l.config.dim + clip_g.config.dim
        if both > width:
            raise UserError(
                f"the two CLIPs are {both} wide together; the transformer reads {width}: they are "
                "of another model"
            )
        if t5 is not None and t5.config.dim != width:
            raise UserError(
                f"T5 is {t5.config.dim} wide; the transformer reads {width}: it is of another model"
            )
        self.clip_l = clip_l
        self.clip_g = clip_g
        self.t5 = nnx.data(t5)
        self.width = width
        self.t5_length = t5_length

    def __call__(self, tokens: Int[Array, "b t"]) -> Conditioning:
        """float32 embeddings of ids: all that each CLIP has positions for, then T5's if any."""
        first_ids, second_ids, t5_ids = _split(tokens, (self.clip_l, self.clip_g))
        first, second = self.clip_l(first_ids), self.clip_g(second_ids)
        assert first.projected is not None  # both seen to above
        assert second.projected is not None
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


def encode(
    encoder: T5Encoder | FluxText | SD3Text, tokens: Int[Array, "b t"], pad_id: int
) -> Conditioning:
    """What a transformer is told by its text encoders, which of small models are a T5 alone.

    Of a T5 alone the pooled embedding is the mean over what is not padding. As in FLUX, padding is
    not masked: every text token takes part in the joint attention.
    """
    if isinstance(encoder, FluxText | SD3Text):
        return encoder(tokens)
    txt = encoder(tokens).astype(jnp.float32)
    return Conditioning(txt=txt, pooled=_mean(txt, tokens != pad_id))


def _split(
    tokens: Int[Array, "b t"], clips: tuple[CLIPTextEncoder, ...]
) -> list[Int[Array, "b n"]]:
    """The ids of each CLIP, which are as many as it has positions, and the rest."""
    parts, start = [], 0
    for clip in clips:
        parts.append(tokens[:, start : start + clip.config.max_tokens])
        start += clip.config.max_tokens
    return [*parts, tokens[:, start:]]


def _mean(txt: Float[Array, "b t k"], keep: jax.Array) -> Float[Array, "b k"]:
    weight = keep.astype(txt.dtype)[..., None]
    return (txt * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
