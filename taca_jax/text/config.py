"""The text configuration of a model that is trained from scratch."""

from dataclasses import dataclass

from taca_jax.config.fields import check
from taca_jax.text.t5 import T5Config


@dataclass(frozen=True)
class TextConfig:
    """How captions become the transformer's text input.

    tokenizer: `shapes` (the words of the shapes data), `bytes` (UTF-8), or a Hugging Face
      tokenizer: the path of a folder, or a hub id.
    length: tokens per caption; longer captions are cut, shorter ones padded.
    encoder: config of a text encoder trained from scratch with the model; none uses the base's
      `text_encoder/`.
    """

    tokenizer: str = "bytes"
    length: int = 64
    encoder: T5Config | None = None

    def __post_init__(self):
        check(bool(self.tokenizer), "text.tokenizer", "empty", "shapes, bytes or a folder")
        check(self.length >= 1, "text.length", self.length, "1 or more tokens")
