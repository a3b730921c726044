"""Prompt to picture with Stable Diffusion 3 and 3.5, and TACA."""

from typing import Any

from taca_jax.errors import UserError
from taca_jax.families.sd3.model import SD3Transformer
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.text import Load, load_sd3_text
from taca_jax.text.encoders import SD3Text
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.weights.pipeline_folders import Parts


class SD3Pipeline(Pipeline):
    """A Stable Diffusion 3 transformer with what it needs around it; parts may be absent where
    embeddings or latents are given instead.

    Its text encoders are CLIP-L in `text_encoder/`, CLIP-bigG in `text_encoder_2/` and, if it is
    there, T5 in `text_encoder_3/`.
    """

    transformer: SD3Transformer
    kind = "sd3"
    text_encoders = "Stable Diffusion 3 has two CLIPs, and T5 or not"
    has_skip_layers = True

    @classmethod
    def _load_text(cls, parts: Parts, load: Load, config: Any) -> tuple[SD3Text, Tokenizer] | None:
        return load_sd3_text(parts, load, txt_dim=config.txt_dim, pooled_dim=config.pooled_dim)

    def _check_grid(self, rows: int, columns: int) -> None:
        config = self.transformer.config
        if max(rows, columns) > config.position_size:
            size = config.position_size
            raise UserError(
                f"the picture is {rows} x {columns} tokens; this model has positions for {size} x "
                f"{size} at most: draw a smaller one"
            )
