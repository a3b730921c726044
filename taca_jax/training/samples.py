"""Samples while training: the same prompts and noise each time, plain and as trained so far, in one
picture."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from PIL import Image

from taca_jax.autoencoders.kinds import Autoencoder
from taca_jax.data.cache.reader import Cache
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.processes import is_first
from taca_jax.pipelines.batching import even_size, filled_up, most_of_tokens, rows_of
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.grids import caption_grid
from taca_jax.pipelines.pipeline import Embeds, Pipeline
from taca_jax.taca import TacaConfig, describe_gamma
from taca_jax.training.log import RunLog, after
from taca_jax.training.models import InputModels, RunModels, TextToImage
from taca_jax.training.sample_options import sample_guidance, sample_size

FOLDER = "samples"
"""In a run's folder: a picture for each step at which samples are drawn."""


class Samples:
    """Draws what `config.sample_prompts` say, with the model as it is after some steps.

    Every picture comes from the same compiled program. Those of columns that training does not
    change are drawn once.
    """

    def __init__(self, models: RunModels, inputs: InputModels | Cache):
        """With a cache, the prompts are read from it, and the autoencoder is loaded."""
        self._models = models
        self._inputs: InputModels | Autoencoder
        self._text: Embeds | None = None
        if isinstance(inputs, Cache):
            self._inputs = models.load_autoencoder()
            self._text = _stored_text(models, inputs)
        else:
            self._inputs = inputs
        self._unchanging: dict[Variant, list[Image.Image]] = {}

    def draw(self, model: TextToImage, step: int, log: RunLog | None) -> None:
        """Writes the samples after `step` into the run's folder and, from the first process, to
        `log`. All processes must call this together."""
        config = self._models.config
        prompts = config.sample_prompts
        pipeline = self._models.pipeline(model, self._inputs)
        columns = _columns(self._models, model.taca(config))
        drawn = [self._column(pipeline, column) for column in columns]
        if not is_first():
            return
        grid = caption_grid(
            [pictures[i] for i in range(len(prompts)) for pictures in drawn],
            [prompt for prompt in prompts for _ in columns],
            columns=len(columns) if len(columns) > 1 else None,
            headings=[column.name for column in columns] if len(columns) > 1 else (),
        )
        path = config.run_dir / FOLDER / f"{step:07d}.png"
        with whole_file(path) as file:
            grid.save(file, format="PNG")
        if log is not None:
            log.say(f"samples {after(step)}: {path}")
            log.image(step, FOLDER, np.asarray(grid))

    def _column(self, pipeline: Pipeline, column: Variant) -> list[Image.Image]:
        config = self._models.config
        if column in self._unchanging:
            return self._unchanging[column]
        pictures = list(_drawn(self._models, pipeline, column, self._text))
        # Without the LoRA, a base that stays as it is draws the same each time.
        off = isinstance(column.lora_strength, tuple) and not any(column.lora_strength)
        learns_gamma = config.gamma_knots is not None and column.taca is not None
        if config.adapts and off and not learns_gamma:
            self._unchanging[column] = pictures
        return pictures


def _columns(models: RunModels, taca: TacaConfig | None) -> list[Variant]:
    """What is drawn side by side: plain, with TACA, and with the LoRA as far as it is trained."""
    lora = models.config.lora is not None
    off = (0.0,) if lora else ()
    columns = [Variant("plain", None, off)]
    if taca is not None:
        columns.append(Variant(f"TACA, {describe_gamma(taca)}", taca, off))
    if lora:
        columns.append(Variant("LoRA" if taca is None else "TACA + LoRA", taca, (1.0,)))
    return columns


def _drawn(
    models: RunModels, pipeline: Pipeline, column: Variant, text: Embeds | None
) -> Iterator[Image.Image]:
    """A picture of each prompt, in batches of one size; the last one is filled up."""
    config = models.config
    height, width = sample_size(models)
    prompts = config.sample_prompts
    tokens = (height // models.multiple) * (width // models.multiple)
    devices = 1 if models.mesh is None else models.mesh.size
    size = even_size(len(prompts), most_of_tokens(tokens, devices))
    for start in range(0, len(prompts), size):
        rows = filled_up(range(start, min(start + size, len(prompts))), size)
        if text is None:
            chosen = pipeline.embeds(
                [prompts[row] for row in rows], guidance=sample_guidance(models)
            )
        else:
            chosen = rows_of(text, rows)
        pictures = pipeline(
            **chosen,
            height=height,
            width=width,
            steps=config.sample_steps,
            guidance=sample_guidance(models),
            seed=[config.seed + row for row in rows],
            taca=column.taca,
            lora_strength=column.lora_strength,
            progress=False,
        ).images
        assert isinstance(pictures, list)  # output="pil"
        yield from pictures[: len(prompts) - start]


def _stored_text(models: RunModels, cache: Cache) -> Embeds:
    """The inputs of the prompts, from a cache that has them."""
    there, prompts = cache.prompts(), models.config.sample_prompts
    found = [there[prompt] for prompt in prompts]
    text = Embeds(
        prompt_embeds=jnp.stack([each["txt"] for each in found]),
        pooled_prompt_embeds=jnp.stack([each["pooled"] for each in found]),
    )
    if sample_guidance(models) > 1 and not models.family.embeds_guidance(models.transformer):
        repeat = (len(prompts), 1)
        text["negative_prompt_embeds"] = jnp.tile(cache.empty["txt"], (*repeat, 1))
        text["negative_pooled_prompt_embeds"] = jnp.tile(cache.empty["pooled"], repeat)
    return text
