"""Draws pictures from a prompt, or from a list of prompts, and writes them with their settings."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.parallel.processes import (
    do_not_wait_at_exit,
    is_first,
    join_processes,
    print_once,
    wait_for_all,
)
from taca_jax.pipelines.announcing import (
    describe_base,
    say_devices,
    say_drawing,
    with_values_used,
)
from taca_jax.pipelines.batching import (
    Batch,
    batch_size,
    batches_of,
    drawn,
    most_together,
    strength_of,
)
from taca_jax.pipelines.checks import check_drawing, check_list
from taca_jax.pipelines.config import GenerateConfig, SamplingConfig, Variant
from taca_jax.pipelines.grids import caption_grid, enlarged
from taca_jax.pipelines.loras import used_loras
from taca_jax.pipelines.opening import samples_of
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.previews import OWN, Preview
from taca_jax.pipelines.prompt_files import read_prompts
from taca_jax.pipelines.writing import described, missing, named_in, write_picture
from taca_jax.storage.places import Place, place
from taca_jax.taca import TacaConfig, describe_gamma, describe_steps
from taca_jax.telling.start import say_fact, wrapped
from taca_jax.weights.pipeline_folders import StoredPipeline, open_pipeline


def generate(config: GenerateConfig) -> list[Place]:
    """Draws as configured and returns the files written, in which small pictures are enlarged.

    If there are several processes, all call this and the first writes. Raises UserError for
    problems that the user can fix.
    """
    join_processes()
    try:
        return _generate(config)
    except BaseException:
        do_not_wait_at_exit()
        raise


def _generate(config: GenerateConfig) -> list[Place]:
    if config.prompts is not None:
        return _generate_list(config)
    stored = check_drawing(config)  # before any model loads
    size = batch_size(config, stored, len(jax.devices()))
    pipeline = load_pipeline(
        config,
        config.mesh,
        stored=stored,
        stages=config.stages,
        samples=samples_of(stored, size, config.guidance),
        strength=strength_of(config),
    )
    variants, rows = _variants(pipeline, config), []
    config = with_values_used(config, pipeline, size)
    say_devices(pipeline)
    say_drawing(config)
    _prepare_previews(pipeline, config, variants)
    pictures = [
        replace(config, num_images=1, seed=config.seed + i, out=str(name))
        for i, name in enumerate(_names(config))
    ]
    for batch, made in drawn(
        pipeline, batches_of(pictures, lambda _: size), variants, partial(_preview, config)
    ):
        rows += zip(batch.pictures, zip(*made, strict=True), strict=True)
        if config.compare:
            continue
        for picture, (image,) in rows if is_first() else ():
            write_picture(place(picture.out), image, described(picture))
        rows = []
    if config.compare:
        if is_first():
            write_picture(place(config.out), _grid(rows, variants), described(config))
        return [place(config.out)]
    return [place(picture.out) for picture in pictures]


def _generate_list(config: GenerateConfig) -> list[Place]:
    """Draws what is missing of a list of prompts. Each process draws a share of the batches on its
    own devices.

    Batches are of the whole list, and one of which any picture is missing is drawn as a whole, so
    that on the same devices a picture has the same bytes however often the command is stopped.
    """
    lines = read_prompts(config)
    stored, pictures = check_list(config, lines)
    devices = jax.local_devices()
    batches = batches_of(pictures, lambda each: most_together(each, stored, len(devices)))
    absent = {picture.out for picture in missing(pictures)}
    todo = [batch for batch in batches if any(each.out in absent for each in batch.pictures)]
    print_once(
        f"{config.prompts}: {len(lines)} prompts; {len(absent)} of {len(pictures)} pictures to draw"
    )
    # Nobody writes before all have listed what is missing.
    wait_for_all("a list of what is missing")
    share = todo[jax.process_index() :: jax.process_count()]
    if share:
        samples = samples_of(stored, *max((b.size, b.pictures[0].guidance or 0) for b in batches))
        _draw_share(config, stored, samples, share, absent)
    wait_for_all("all pictures")
    if left := len(missing(pictures)):
        raise UserError(
            f"{left} of {len(pictures)} pictures are not there, although all were drawn; do all "
            "processes write to the same folder, and has nothing else changed it? Run again"
        )
    print_once(f"all {len(pictures)} pictures are there")
    return [place(picture.out) for picture in pictures]


def _draw_share(
    config: GenerateConfig,
    stored: StoredPipeline,
    samples: int,
    share: Sequence[Batch],
    absent: set[str],
) -> None:
    """Draws batches on this process's devices, and writes those of their pictures that are
    `absent`. The mesh is chosen for so many samples."""
    pipeline = load_pipeline(
        config,
        config.mesh,
        stored=stored,
        stages=config.stages,
        samples=samples,
        devices=jax.local_devices(),
        sizes=list(dict.fromkeys((b.pictures[0].height, b.pictures[0].width) for b in share)),
        strength=strength_of(config),
    )
    say_devices(pipeline)
    variants = _variants(pipeline, config)
    _prepare_previews(pipeline, config, variants)
    total, done = sum(each.out in absent for batch in share for each in batch.pictures), 0
    for batch, made in drawn(pipeline, share, variants, partial(_preview, config)):
        for picture, images in zip(batch.pictures, zip(*made, strict=True), strict=True):
            if picture.out in absent:
                done += 1
                image = _grid([(picture, images)], variants) if config.compare else images[0]
                counted = f", {done} of {total}" + (" here" if jax.process_count() > 1 else "")
                write_picture(
                    place(picture.out), image, described(picture), counted, quiet=not is_first()
                )


def _variants(pipeline: Pipeline, config: GenerateConfig) -> list[Variant]:
    """How each picture is drawn: once, or in every column of a comparison."""
    if not config.compare:
        return [Variant(_describe(config.taca), config.taca, 1.0)]
    without = tuple(float(lora.gate == "always") for lora in pipeline.loras)
    columns = [
        Variant("plain", None, without),
        Variant(_describe(config.taca), config.taca, without),
    ]
    if not all(without):
        columns.append(Variant("TACA + LoRA", config.taca, 1.0))
    return columns


def _grid(
    rows: Sequence[tuple[GenerateConfig, Sequence[Image.Image]]], columns: Sequence[Variant]
) -> Image.Image:
    """Pictures in rows, each drawn in all of the columns' variants."""
    captions = [f"{picture.prompt} (seed {picture.seed})" for picture, _ in rows]
    return caption_grid(
        [image for _, images in rows for image in images],
        [caption for caption in captions for _ in columns],
        columns=len(columns),
        headings=[column.name for column in columns],
    )


def local_mesh(config: SamplingConfig) -> Mesh | None:
    """The configured mesh over this process's devices, which share the samples and the parameters
    if it is left open; None if there is one device in all.

    Raises UserError as `make_mesh` does.
    """
    mesh = make_mesh(config.mesh, jax.local_devices())
    return None if len(jax.devices()) == 1 else mesh


def load_pipeline(
    config: SamplingConfig,
    mesh: Mesh | MeshConfig | None,
    *,
    stored: StoredPipeline | None = None,
    stages: bool | None = False,
    samples: int | None = None,
    devices: Sequence[Any] | None = None,
    sizes: Collection[tuple[int | None, int | None]] = (),
    strength: float | None = None,
) -> Pipeline:
    """The pipeline that is configured, with its LoRAs; says what and how large its models are,
    which LoRAs are used and when TACA acts.

    stored: that pipeline, if it is opened already. mesh, stages, samples, devices: as
    `Pipeline.from_pretrained` takes them. sizes, strength: of the pictures, for the line on TACA;
    by default the configured size, drawn from noise alone. Raises UserError as that and `load_lora`
    do.
    """
    stored = stored or open_pipeline(config.base, config.tokenizers)
    formats = config.dtype, config.quantize, config.quantize_text
    say_fact("base", describe_base(config.base, stored, *formats))
    pipeline = Pipeline.from_pretrained(
        stored,
        dtype=config.dtype,
        mesh=mesh,
        devices=devices,
        stages=stages,
        samples=samples,
        quantize=config.quantize,
        quantize_text=config.quantize_text,
        attention=config.attention,
    )
    used = used_loras(config)
    # All at once: in stages, a transformer that is read gets all of its LoRAs anew.
    if used:
        for said in pipeline.load_lora(used).splitlines():
            say_fact("LoRA", said)
    for choice in config.lora_choices:
        if choice not in used:
            say_fact("LoRA", f"{choice.path} is not used: it acts only while TACA does")
    if config.taca is not None:
        for height, width in sizes or [(config.height, config.width)]:
            which = f"{height} x {width} pixels: " if len(sizes) > 1 else ""
            times = pipeline.timesteps(height, width, config.steps, strength)
            print_once(wrapped(which + describe_steps(config.taca, times)))
    return pipeline


def preview_path(config: GenerateConfig, variant: Variant) -> Place:
    """The file of previews, in a comparison one for each column; each one overwrites the last."""
    columns = {"plain": "-plain", "TACA + LoRA": "-taca-lora"}
    name = f"preview{columns.get(variant.name, '-taca') if config.compare else ''}.png"
    return named_in(config.out, name)


def _prepare_previews(
    pipeline: Pipeline, config: GenerateConfig, variants: Sequence[Variant]
) -> None:
    if config.preview is None:
        return
    if config.preview != OWN:
        pipeline.load_previewer(config.preview)
    files = ", ".join(str(preview_path(config, variant)) for variant in variants)
    print_once(f"previews: {files}, after each step")


def _preview(config: GenerateConfig, batch: Batch, variant: Variant) -> Preview | None:
    """The previews of a call, if there are any. Of processes that draw a share each, only the first
    one draws them."""
    if config.preview is None or (config.prompts is not None and not is_first()):
        return None
    return partial(_write_preview, preview_path(config, variant), len(batch.pictures))


def _write_preview(path: Place, count: int, step: int, pictures: list[Image.Image]) -> None:
    """Writes the first `count` pictures of a batch side by side."""
    del step
    if not is_first():
        return
    pictures = [enlarged(picture) for picture in pictures[:count]]
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * width, 0))
    with whole_file(path) as file:
        row.save(file, format="PNG")


def _describe(taca: TacaConfig | None) -> str:
    return "plain" if taca is None else f"TACA, {describe_gamma(taca)}"


def _names(config: GenerateConfig) -> list[Place]:
    """The files to write; the names of several pictures are numbered."""
    out, count = place(config.out), config.num_images
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i:03d}") for i in range(count)]
