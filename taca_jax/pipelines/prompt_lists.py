"""Many prompts in one command: the pictures of a list, and whether the model can draw them."""

from collections.abc import Mapping
from dataclasses import replace

from taca_jax.errors import UserError
from taca_jax.pipelines.batching import with_model_values
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.inputs import check_negative
from taca_jax.pipelines.opening import tokens_in
from taca_jax.pipelines.prompt_files import where
from taca_jax.pipelines.text import load_tokenizers
from taca_jax.pipelines.writing import named_in
from taca_jax.storage.places import Place
from taca_jax.weights.pipeline_folders import StoredPipeline

Lines = Mapping[int, GenerateConfig]
"""The command of each line of a list, by its number."""


def pictures_in_list(
    config: GenerateConfig, lines: Lines, stored: StoredPipeline
) -> list[GenerateConfig]:
    """All pictures of a list in its order, with the values that they are drawn with.

    Raises UserError that names the line for what this model cannot draw: sizes, negative prompts
    and words. Nothing is loaded but tokenizers.
    """
    reading = stored.reading
    tokenizer = None if reading is None else load_tokenizers(stored, reading)
    family, model = stored.family, stored.transformer.config
    pictures = []
    for number, line in lines.items():
        line = with_model_values(line, stored.settings)
        assert line.height is not None  # the model has one
        assert line.width is not None
        assert line.guidance is not None
        try:
            tokens_in(stored, line.height, line.width)
            if line.negative_prompt is not None:
                check_negative(line.guidance, embedded=family.embeds_guidance(model))
            if tokenizer is not None:
                tokenizer([line.prompt, line.negative_prompt or ""])
        except UserError as error:
            raise UserError(f"{where(config, number)}: {error}") from None
        for i in range(config.num_images):
            out = str(picture_file(config, number, i))
            pictures.append(replace(line, num_images=1, seed=line.seed + i, out=out))
    return pictures


def picture_file(config: GenerateConfig, number: int, picture: int) -> Place:
    """The file of a line's picture; it depends on nothing but their numbers and `config.out`."""
    return named_in(config.out, f"{number:05d}-{picture:03d}.png")
