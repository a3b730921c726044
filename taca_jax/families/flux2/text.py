"""How FLUX.2 [klein] reads prompts: with Qwen3, as what a user says to it."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from taca_jax.errors import UserError
from taca_jax.families.flux2.model import Flux2Config
from taca_jax.nn.conditioning import Conditioning
from taca_jax.text.encoders import StoredEncoders, TextEncoder, TextReading
from taca_jax.text.qwen3 import CHAT, Qwen3Config, Qwen3Encoder


class Flux2Text(TextEncoder):
    """Hidden states of Qwen3, and no pooled embedding.

    Qwen3 does not attend to padding, which is at the end; the transformer attends to all tokens.
    Source: diffusers' `Flux2KleinPipeline.encode_prompt`.
    """

    def __init__(self, qwen3: Qwen3Encoder, *, pad_id: int):
        self.qwen3 = qwen3
        self.pad_id = pad_id

    @property
    def encoders(self) -> Sequence[nnx.Module]:
        return (self.qwen3,)

    def __call__(self, tokens: Int[Array, "b t"]) -> Conditioning:
        is_text = tokens != self.pad_id
        mask = jnp.flip(jnp.cumsum(jnp.flip(is_text, 1), 1), 1) > 0  # up to the last that is text
        return Conditioning(
            txt=self.qwen3(tokens, mask).astype(jnp.float32), pooled=jnp.zeros((len(tokens), 0))
        )

    def embedded(self, marked: Bool[Array, "b t"]) -> Bool[Array, "b n"]:
        return marked


def read_text(config: Flux2Config, stored: StoredEncoders) -> TextReading | None:
    """How a transformer reads prompts; None without Qwen3 (dev's encoder, Mistral, is not
    supported).

    Raises UserError for an encoder of another width than the transformer's input, and for several.
    """
    found = stored.of_kind(Qwen3Config, "Qwen3", most=1)
    if not found:
        return None
    ((folder, qwen3),) = found.items()
    if qwen3.config.width != config.txt_dim:
        raise UserError(
            f"{qwen3.where} gives {qwen3.config.width} channels, the transformer reads "
            f"{config.txt_dim}; it is of another model"
        )
    return TextReading(
        (folder,),
        lambda encoders, pad_id: Flux2Text(*encoders, pad_id=pad_id),
        stored.text_length,
        frame=CHAT,
    )
