"""Draws the pictures of an evaluation."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taca_jax.config.json_text import to_tree
from taca_jax.errors import UserError
from taca_jax.evaluation.shapes.halves import Half
from taca_jax.formats.atomic import whole_file
from taca_jax.pipelines.batching import filled_up
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.decoding import eight_bit
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.telling.bars import shown

PICTURES = "pictures"
"""The folder of the kept batches, in that of an evaluation."""


@dataclass(frozen=True)
class Sampler:
    """Draws a picture of each prompt: picture i of a half from the noise of `seed` + i, however
    large the batches are, and in each variant from the same noise.

    steps, height, width: as in a call of the pipeline. kept: a folder that keeps every batch, as
    one picture of all its pictures in a column; what it has is not drawn again. None keeps none.
    lora: the digest of the pipeline's LoRAs, which tells apart what is kept of one and of another.
    """

    pipeline: Pipeline
    batch_size: int
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    kept: Path | None = None
    lora: str | None = None

    def draw(self, half: Half, variant: Variant) -> np.ndarray:
        """uint8 [n, height, width, 3]: the pictures of a half's prompts.

        Raises UserError for a kept batch that cannot be read.
        """
        starts = range(0, len(half.prompts), self.batch_size)
        what = f"sampling {half.name}: {variant.name}"
        return np.concatenate(
            [self._batch(half, variant, start) for start in shown(starts, what, len(starts))]
        )

    def _batch(self, half: Half, variant: Variant, start: int) -> np.ndarray:
        prompts = list(half.prompts[start : start + self.batch_size])
        if self.kept is None:
            return self._sample(prompts, variant, start)
        drawn_as = self._drawn_as(variant)
        key = hashlib.sha256(drawn_as.encode()).hexdigest()[:16]
        file = self.kept / f"{half.name}-{start:06}-{key}.png"
        if not file.is_file():
            pictures = self._sample(prompts, variant, start)
            column = Image.fromarray(pictures.reshape(-1, *pictures.shape[2:]))
            info = PngInfo()
            info.add_itxt("taca_jax", drawn_as)
            with whole_file(file) as whole:
                column.save(whole, format="PNG", pnginfo=info)
        try:
            with Image.open(file) as column:
                pixels = np.asarray(column)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error}); remove it and run again") from None
        return pixels.reshape(len(prompts), -1, *pixels.shape[1:])

    def _drawn_as(self, variant: Variant) -> str:
        """JSON of all that distinguishes a variant's pictures from another's."""
        taca = None if variant.taca is None else to_tree(variant.taca)
        lora = self.lora if variant.lora_strength else None
        settings = {
            "taca": taca,
            "lora": lora,
            "lora_strength": variant.lora_strength,
            "guidance": variant.guidance,
        }
        return json.dumps(settings, sort_keys=True)

    def _sample(self, prompts: list[str], variant: Variant, start: int) -> np.ndarray:
        # The last batch is padded, so that all batches run the same compiled program.
        padded = filled_up(prompts, self.batch_size)
        images = self.pipeline(
            padded,
            height=self.height,
            width=self.width,
            steps=self.steps,
            guidance=variant.guidance,
            seed=self.seed + start,
            taca=variant.taca,
            lora_strength=variant.lora_strength,
            output="array",
            progress=False,
        ).images
        return eight_bit(np.asarray(images)[: len(prompts)])
