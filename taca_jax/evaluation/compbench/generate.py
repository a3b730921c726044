"""`compbench generate`: draws the pictures of T2I-CompBench.

Picture n of a category is of prompt n // num_images, from seed + n % num_images, as upstream's
script numbers and seeds them. Pictures are drawn in fixed batches of successive numbers, counted
over the whole list, and a batch of which any picture is missing is drawn as a whole: on the same
devices a picture has the same bytes however often the run is stopped, and whoever draws it.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taca_jax.config.json_text import to_tree
from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.config import PicturesConfig
from taca_jax.evaluation.compbench.folders import (
    SAMPLES,
    check_prompts,
    picture_name,
    write_prompts,
)
from taca_jax.evaluation.compbench.prompts import Lists, read_lists
from taca_jax.evaluation.record import check_record, model_files, write_record
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.processes import (
    do_not_wait_at_exit,
    is_first,
    join_processes,
    print_once,
    wait_for_all,
)
from taca_jax.pipelines.batching import filled_up
from taca_jax.pipelines.checks import check_evaluation
from taca_jax.pipelines.generate import load_pipeline, local_mesh
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.writing import png_info
from taca_jax.telling.bars import shown

FREE_FIELDS = ("prompts", "out", "categories", "limit")
"""Fields that may change while a folder is completed; none of them changes a picture."""


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together: their category, and the numbers in it."""

    category: str
    numbers: range


Open = Callable[[PicturesConfig], Pipeline]
"""Loads the pipeline of a configuration, with its LoRAs."""


def generate(config: PicturesConfig) -> None:
    """Draws what is missing in `config.out`. If there are several processes, all must call this.

    Each process draws a share of the batches on its own devices. Raises UserError for problems that
    the user can fix, among them a folder that was drawn with other settings or weights.
    """
    with joined():
        lists = read_lists(config.prompts, config.categories)
        check_evaluation(config, all_prompts(lists))
        check_folder(config, lists)
        draw(config, lists, lambda config: load_pipeline(config, local_mesh(config)))


@contextmanager
def joined() -> Iterator[None]:
    """As one of several processes, if this one was started so: if it fails, it ends at once."""
    join_processes()
    try:
        yield
    except BaseException:
        do_not_wait_at_exit()
        raise


def all_prompts(lists: Lists) -> list[str]:
    return [prompt for prompts in lists.values() for prompt in prompts]


def check_folder(config: PicturesConfig, lists: Lists) -> None:
    """Raises UserError if `config.out` has pictures of other settings, weights or prompts."""
    check_record(Path(config.out), config, model_files(config), free=FREE_FIELDS)
    check_prompts(Path(config.out), lists, config.num_images)


def draw(config: PicturesConfig, lists: Lists, opened: Open) -> None:
    """Draws what is missing in `config.out`, which `check_folder` has seen; `opened` is called if
    this process has something to draw. Raises UserError if pictures are lost meanwhile."""
    out = Path(config.out)
    missing = _missing(config, lists)
    total = sum(_count(config, prompts) for prompts in lists.values())
    print_once(f"{out}: {_pictures(missing)} of {total} pictures to draw")
    share = list(missing.items())[jax.process_index() :: jax.process_count()]
    pipeline = opened(config) if share else None
    # Only now, so that a run that cannot start leaves no record behind, and nobody draws before all
    # have listed what is missing.
    wait_for_all("a run that can begin")
    if is_first():
        write_record(out, config, model_files(config))
        write_prompts(out, lists, config.num_images)
    if pipeline is not None:
        for batch, wanted in shown(share, "drawing batches", len(share)):
            _draw(pipeline, config, lists, batch, wanted)
    wait_for_all("all pictures")
    if left := _pictures(_missing(config, lists)):
        raise UserError(
            f"{out}: {left} of {total} pictures are not there, although all were drawn; do "
            "all processes write to this folder, and has nothing else changed it? Run again"
        )
    print_once(f"{out}: all {total} pictures are there")


def batches(config: PicturesConfig, lists: Lists) -> Iterator[Batch]:
    """The batches of all pictures; what is there already changes neither them nor their order."""
    for category, prompts in lists.items():
        total = len(prompts) * config.num_images
        for start in range(0, _count(config, prompts), config.batch_size):
            yield Batch(category, range(start, min(start + config.batch_size, total)))


def _count(config: PicturesConfig, prompts: Sequence[str]) -> int:
    """How many pictures of a list are to be drawn."""
    return len(prompts[: config.limit]) * config.num_images


def _missing(config: PicturesConfig, lists: Lists) -> dict[Batch, list[int]]:
    """The pictures that are to be drawn and are not there, by batch; batches without any are left
    out."""
    found = {batch: _wanted(config, lists, batch) for batch in batches(config, lists)}
    return {batch: wanted for batch, wanted in found.items() if wanted}


def _pictures(missing: Mapping[Batch, Sequence[int]]) -> int:
    """How many pictures are missing."""
    return sum(map(len, missing.values()))


def _wanted(config: PicturesConfig, lists: Lists, batch: Batch) -> list[int]:
    """The pictures of a batch that are to be drawn and are not there."""
    count = _count(config, lists[batch.category])
    return [n for n in batch.numbers if n < count and not _path(config, lists, batch, n).exists()]


def _path(config: PicturesConfig, lists: Lists, batch: Batch, number: int) -> Path:
    prompt = lists[batch.category][number // config.num_images]
    return Path(config.out, batch.category, SAMPLES, picture_name(prompt, number))


def _draw(
    pipeline: Pipeline,
    config: PicturesConfig,
    lists: Lists,
    batch: Batch,
    wanted: Sequence[int],
) -> None:
    """Draws a batch and writes those of its pictures that are wanted."""
    # The last batch is filled up, so that all run the same compiled program.
    numbers = [*batch.numbers]
    filled = filled_up(numbers, config.batch_size)
    prompts = [lists[batch.category][n // config.num_images] for n in filled]
    seeds = [config.seed + n % config.num_images for n in filled]
    pictures = pipeline(
        prompts,
        height=config.height,
        width=config.width,
        steps=config.steps,
        guidance=config.guidance,
        seed=seeds,
        taca=config.taca,
        progress=False,
    ).images
    assert isinstance(pictures, list)  # output="pil"
    for number, picture, prompt, seed in zip(numbers, pictures, prompts, seeds, strict=False):
        if number in wanted:
            info = _described(config, prompt, seed)
            _write(_path(config, lists, batch, number), number, picture, info)


def _described(config: PicturesConfig, prompt: str, seed: int) -> PngInfo:
    """What a picture says of itself, as those of generate.py do."""
    settings = {k: v for k, v in to_tree(config).items() if k not in FREE_FIELDS}
    return png_info({**settings, "prompt": prompt, "seed": seed})


def _write(path: Path, number: int, picture: Image.Image, info: PngInfo) -> None:
    """Writes a picture whole or not at all; among the samples there is never anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the folder of samples, under a short name, and moved there when it is whole.
    beside = path.parent.with_name(f"{number:06}.png")
    with whole_file(beside) as file:
        picture.save(file, format="PNG", pnginfo=info)
    os.replace(beside, path)
