"""Pictures in batches: which are drawn together, and drawing them.

A picture to draw is a GenerateConfig of one picture: its prompt, seed, size and guidance, and in
`out` its file. Whatever is drawn in one call shares a size and a strength of guidance.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import jax.numpy as jnp
import numpy as np
from PIL import Image

from taca_jax.parallel.processes import is_first, on_host, spans_processes
from taca_jax.pipelines.config import GenerateConfig, Variant
from taca_jax.pipelines.decoding import Output
from taca_jax.pipelines.image_inputs import STRENGTH
from taca_jax.pipelines.inputs import picture_size
from taca_jax.pipelines.opening import tokens_in
from taca_jax.pipelines.pipeline import Embeds, Pipeline, PipelineOutput
from taca_jax.pipelines.previews import Preview
from taca_jax.weights.pipeline_folders import PipelineSettings, StoredPipeline

TOKENS_TOGETHER = 4096
"""Image tokens that are drawn at a time on each device, unless batch_size says otherwise. More
would take memory, and no more time would be saved: matrix units are busy with this many."""

PICTURES_A_TURN = 256
"""Where models take turns in memory, at least so many pictures are drawn between two readings of a
model, if there are as many: what is drawn is written only when the autoencoder has had its turn."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together, in a call that draws `size` of them."""

    pictures: tuple[GenerateConfig, ...]
    size: int


def with_model_values(config: GenerateConfig, settings: PipelineSettings) -> GenerateConfig:
    """`config` with the model's own values where it leaves steps, guidance, the size or the
    strength open."""
    height, width = picture_size(config.height, config.width, settings.resolution)
    return replace(
        config,
        height=height,
        width=width,
        steps=settings.steps if config.steps is None else config.steps,
        guidance=settings.guidance if config.guidance is None else config.guidance,
        strength=strength_of(config),
    )


def strength_of(config: GenerateConfig) -> float | None:
    """The strength of a command with an image; None without one."""
    return STRENGTH if config.image is not None and config.strength is None else config.strength


def most_together(config: GenerateConfig, stored: StoredPipeline, devices: int) -> int:
    """How many pictures of a configuration's size are drawn at a time, if there are as many."""
    if config.batch_size is not None:
        return config.batch_size
    return most_of_tokens(tokens_in(stored, config.height, config.width), devices)


def most_of_tokens(tokens: int, devices: int) -> int:
    """How many pictures of so many image tokens are drawn at a time, at most."""
    return devices * max(1, TOKENS_TOGETHER // max(1, tokens))


def even_size(count: int, most: int) -> int:
    """The size of the batches of `count` pictures, which is the same for all: at most `most`."""
    batches = -(-count // most)
    return -(-count // batches)


def batch_size(config: GenerateConfig, stored: StoredPipeline, devices: int) -> int:
    """How many of a command's pictures are drawn at a time: of several batches, all have this
    size."""
    return even_size(config.num_images, most_together(config, stored, devices))


def batches_of(
    pictures: Sequence[GenerateConfig], most: Callable[[GenerateConfig], int]
) -> list[Batch]:
    """Pictures, `with_model_values`, in batches, in the order of each one's first picture.

    Pictures of one size and guidance are drawn together, as many as `most` says. All batches of a
    size draw as many in a call, so that they run the same compiled program.
    """
    groups: dict[Any, list[int]] = {}
    for i, picture in enumerate(pictures):
        key = (picture.height, picture.width, picture.guidance)
        groups.setdefault(key, []).append(i)
    found: dict[int, Batch] = {}
    for (height, width, _), members in groups.items():
        longest = max(len(each) for key, each in groups.items() if key[:2] == (height, width))
        size = min(longest, most(pictures[members[0]]))
        for start in range(0, len(members), size):
            some = members[start : start + size]
            found[some[0]] = Batch(tuple(pictures[i] for i in some), size)
    return [found[first] for first in sorted(found)]


def rows_of(text: Embeds, rows: Sequence[int]) -> Embeds:
    """The embeddings of these prompts of several, in this order."""
    chosen = jnp.asarray(rows)
    found = cast(Mapping[str, Any], text)
    return cast(Embeds, {name: array[chosen] for name, array in found.items()})


def filled_up(items: Sequence[Item], size: int) -> list[Item]:
    """The items, and copies of the last one, so that there are `size`."""
    return [*items, *[items[-1]] * (size - len(items))]


def drawn(
    pipeline: Pipeline,
    batches: Sequence[Batch],
    variants: Sequence[Variant],
    preview: Callable[[Batch, Variant], Preview | None],
) -> Iterator[tuple[Batch, list[list[Image.Image]]]]:
    """Each batch with its pictures in each variant, `[variant][picture]`, when they are ready.

    Where models take turns in memory, the prompts of many batches are read first, then their
    pictures are drawn, then decoded. `preview` gives a call its previews.
    """

    def call(batch: Batch, text: Embeds, variant: Variant, output: Output) -> PipelineOutput:
        config = batch.pictures[0]
        shown = is_first() or spans_processes(pipeline.mesh)
        return pipeline(
            **text,
            height=config.height,
            width=config.width,
            steps=config.steps,
            guidance=config.guidance,
            seed=filled_up([picture.seed for picture in batch.pictures], batch.size),
            image=starts.latents(batch),
            strength=config.strength,
            taca=variant.taca,
            lora_strength=variant.lora_strength,
            output=output,
            sampler=config.sampler,
            tiling=config.tiling,
            preview=preview(batch, variant),
            progress=config.progress if shown else False,
        )

    def wanted(batch: Batch, images: Any) -> list[Image.Image]:
        assert isinstance(images, list)  # output="pil"
        return images[: len(batch.pictures)]

    reader, starts = _Reader(pipeline), _Starts(pipeline)
    if not pipeline.staged:
        for batch in batches:
            text = reader.text(batch)
            made = [call(batch, text, variant, "pil").images for variant in variants]
            yield batch, [wanted(batch, images) for images in made]
        return
    for turn in _turns(batches):
        texts = [reader.text(batch) for batch in turn]
        for batch in turn:  # before the transformer's turn
            starts.latents(batch)
        latents = [
            [on_host(call(batch, text, variant, "latents").latents) for variant in variants]
            for batch, text in zip(turn, texts, strict=True)
        ]
        for batch, found in zip(turn, latents, strict=True):
            tiling = batch.pictures[0].tiling
            made = [pipeline.decode(jnp.asarray(each), tiling=tiling) for each in found]
            yield batch, [wanted(batch, images) for images in made]


def _turns(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Successive batches that have PICTURES_A_TURN together, or a few more."""
    turn: list[Batch] = []
    for batch in batches:
        turn.append(batch)
        if sum(len(each.pictures) for each in turn) >= PICTURES_A_TURN:
            yield turn
            turn = []
    if turn:
        yield turn


@dataclass
class _Starts:
    """Encodes the image to start from, once for each size."""

    pipeline: Pipeline
    found: dict[tuple[int | None, int | None], np.ndarray] = field(default_factory=dict)

    def latents(self, batch: Batch) -> np.ndarray | None:
        """The latents of the image at the batch's size; None where there is none."""
        first = batch.pictures[0]
        if first.image is None:
            return None
        size = (first.height, first.width)
        if size not in self.found:
            self.found[size] = self.pipeline.encode_images(first.image, *size)
        return self.found[size]


@dataclass
class _Reader:
    """Reads the prompts of batches; of successive batches with the same prompts only once.

    What is read depends on the batch alone, so that a picture has the same bytes whatever else is
    drawn.
    """

    pipeline: Pipeline
    key: Any = None
    found: Embeds | None = None

    def text(self, batch: Batch) -> Embeds:
        """The arguments of a call that draws the batch."""
        pairs = [(each.prompt, each.negative_prompt) for each in batch.pictures]
        several = list(dict.fromkeys(pairs))
        key = (tuple(several), batch.pictures[0].guidance, batch.size)
        if self.found is None or self.key != key:
            self.key, self.found = key, self._read(several, batch)
        rows = [several.index(pair) for pair in filled_up(pairs, batch.size)]
        return rows_of(self.found, rows)

    def _read(self, several: list[tuple[str, str | None]], batch: Batch) -> Embeds:
        if len(several) > 1:  # then as many as the next batch has, for the same compiled program
            several = filled_up(several, batch.size)
        prompts, negatives = [pair[0] for pair in several], [pair[1] for pair in several]
        negative = negatives[0]
        if any(each != negative for each in negatives):
            negative = [each or "" for each in negatives]
        text = self.pipeline.embeds(prompts, negative, guidance=batch.pictures[0].guidance)
        if not self.pipeline.staged or spans_processes(self.pipeline.mesh):
            return text
        return cast(Embeds, {name: on_host(array) for name, array in text.items()})
