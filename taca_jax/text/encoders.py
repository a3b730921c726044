"""From token ids to a transformer's conditioning: the text encoders of a model as one module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from taca_jax.errors import UserError
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.kinds import kind_of
from taca_jax.text.clip import CLIPConfig, CLIPTextEncoder
from taca_jax.text.t5 import T5Encoder

FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders of a pipeline's text encoders, named as in diffusers; their config.json has the kind."""


class TextEncoder(nnx.Module):
    """All text encoders of a model as one module: token ids in, conditioning out.

    Families that combine several encoders derive from this.
    """

    @property
    def encoders(self) -> Sequence[nnx.Module]:
        """The encoders, in the order of their folders."""
        raise NotImplementedError

    def __call__(self, tokens: Int[Array, "b t"]) -> Conditioning:
        """float32 embeddings; `tokens` are the ids of all encoders, concatenated in their order."""
        raise NotImplementedError

    def embedded(self, marked: Bool[Array, "b t"]) -> Bool[Array, "b n"]:
        """Which text tokens are embeddings of marked ids, of those that `__call__` takes."""
        raise NotImplementedError


class T5Text(TextEncoder):
    """T5 alone, for small models: its embedding of every token, and their mean as pooled embedding.

    The mean is over tokens that are not padding (`pad_id`). As in FLUX, padding is not masked:
    every text token takes part in the joint attention.
    """

    def __init__(self, t5: T5Encoder, *, pad_id: int):
        self.t5 = t5
        self.pad_id = pad_id

    @property
    def encoders(self) -> Sequence[nnx.Module]:
        return (self.t5,)

    def __call__(self, tokens: Int[Array, "b t"]) -> Conditioning:
        txt = self.t5(tokens).astype(jnp.float32)
        weight = (tokens != self.pad_id).astype(txt.dtype)[..., None]
        pooled: Float[Array, "b k"] = (txt * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
        return Conditioning(txt=txt, pooled=pooled)

    def embedded(self, marked: Bool[Array, "b t"]) -> Bool[Array, "b n"]:
        return marked


def split_tokens(tokens: Shaped[Array, "b t"], clips: Sequence[CLIPTextEncoder]) -> list[Array]:
    """Splits ids `[b, t]` into those of each CLIP, as many as it has positions, and the rest."""
    parts, start = [], 0
    for clip in clips:
        parts.append(tokens[:, start : start + clip.config.max_tokens])
        start += clip.config.max_tokens
    return [*parts, tokens[:, start:]]


@dataclass(frozen=True)
class TextReading:
    """How a model reads prompts with the text encoders of its pipeline.

    folders: of the encoders that it uses, in the order of their token ids.
    join: (those encoders, the last tokenizer's padding id) -> one TextEncoder.
    tokens: how many text tokens the transformer reads. frame: what a tokenizer of files puts before
    and after each prompt.
    """

    folders: tuple[str, ...]
    join: Callable[[Sequence[Any], int], TextEncoder]
    tokens: int
    frame: tuple[str, str] = ("", "")


class StoredEncoder(Protocol):
    """A text encoder that is not loaded: where it is, for messages, and its config."""

    @property
    def where(self) -> str: ...
    @property
    def config(self) -> Any: ...


@dataclass(frozen=True)
class StoredEncoders:
    """The text encoders of a pipeline by folder, not loaded.

    where: the pipeline, for messages. text_length: tokens that T5 reads, or Qwen3.
    """

    where: str
    models: Mapping[str, StoredEncoder]
    text_length: int

    def of_kind(self, config: type, name: str, *, most: int) -> dict[str, StoredEncoder]:
        """The encoders with this class of config. Raises UserError for more than `most`."""
        found = {}
        for folder, model in self.models.items():
            if kind_of(model.config).role != "text_encoder":
                kind = type(model.config).__name__
                raise UserError(f"{model.where} holds no text encoder but a {kind}")
            if isinstance(model.config, config):
                found[folder] = model
        if len(found) > most:
            raise UserError(
                f"{self.where} has {len(found)} {name} encoders ({', '.join(found)}); expected "
                f"{most}"
            )
        return found


def check_width(encoder: StoredEncoder, expected: int) -> None:
    """Raises UserError unless an encoder's embeddings have the width that the transformer reads."""
    if encoder.config.dim != expected:
        raise UserError(
            f"{encoder.where} is {encoder.config.dim} wide, the transformer reads {expected}; it "
            "is of another model"
        )


def token_count(config: Any, text_length: int) -> int:
    """The token ids that an encoder reads: as many as CLIP has positions, else `text_length`."""
    return config.max_tokens if isinstance(config, CLIPConfig) else text_length
