"""Draws pictures from a prompt and writes them with their settings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taca_jax.config.json_text import to_tree
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.parallel.processes import (
    do_not_wait_at_exit,
    is_first,
    join_processes,
    on_host,
    print_once,
)
from taca_jax.pipelines.announcing import describe_base, say_drawing, with_values_used
from taca_jax.pipelines.checks import check_drawing
from taca_jax.pipelines.config import GenerateConfig, SamplingConfig, Variant
from taca_jax.pipelines.decoding import Output
from taca_jax.pipelines.grids import caption_grid, enlarged
from taca_jax.pipelines.loras import used_loras
from taca_jax.pipelines.opening import samples_of, tokens_in
from taca_jax.pipelines.pipeline import Pipeline, PipelineOutput
from taca_jax.pipelines.previews import OWN
from taca_jax.taca import TacaConfig, describe_gamma, describe_steps
from taca_jax.telling.start import say_fact, wrapped
from taca_jax.weights.pipeline_folders import StoredPipeline, open_pipeline

TOKENS_TOGETHER = 4096
"""Image tokens that are drawn at a time on each device, unless batch_size says otherwise. More
would take memory, and no more time would be saved: matrix units are busy with this many."""


def generate(config: GenerateConfig) -> list[Path]:
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


def _generate(config: GenerateConfig) -> list[Path]:
    stored = check_drawing(config)  # before any model loads
    size = batch_size(config, stored, len(jax.devices()))
    pipeline = load_pipeline(
        config,
        config.mesh,
        stored=stored,
        stages=config.stages,
        samples=samples_of(stored, size, config.guidance),
    )
    config = with_values_used(config, pipeline, size)
    say_drawing(pipeline, config)
    if config.preview is not None:
        if config.preview != OWN:
            pipeline.load_previewer(config.preview)
        print_once(f"previews: {preview_path(config)}, after each step")
    if config.compare:
        return [_compare(pipeline, config, size)]
    names = _names(config)
    variant = Variant(_describe(config.taca), config.taca, 1.0)
    drawn = _drawn(pipeline, config, [variant], size)
    for i, (name, picture) in enumerate(zip(names, drawn, strict=True)):
        _write(name, picture, replace(config, seed=config.seed + i))
    return names


def batch_size(config: GenerateConfig, stored: StoredPipeline, devices: int) -> int:
    """How many pictures are drawn at a time: of several batches, all have this size."""
    most = config.batch_size
    if most is None:
        tokens = tokens_in(stored, config.height, config.width)
        most = devices * max(1, TOKENS_TOGETHER // tokens)
    batches = -(-config.num_images // most)
    return -(-config.num_images // batches)


def _compare(pipeline: Pipeline, config: GenerateConfig, size: int) -> Path:
    without = tuple(float(lora.gate == "always") for lora in pipeline.loras)
    columns = [
        Variant("plain", None, without),
        Variant(_describe(config.taca), config.taca, without),
    ]
    if not all(without):
        columns.append(Variant("TACA + LoRA", config.taca, 1.0))
    drawn, count = list(_drawn(pipeline, config, columns, size)), config.num_images
    captions = [f"{config.prompt} (seed {config.seed + i})" for i in range(count)]
    grid = caption_grid(
        [drawn[column * count + i] for i in range(count) for column in range(len(columns))],
        [caption for caption in captions for _ in columns],
        columns=len(columns),
        headings=[column.name for column in columns],
    )
    out = Path(config.out)
    _write(out, grid, config)
    return out


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
) -> Pipeline:
    """The pipeline that is configured, with its LoRAs; says what and how large its models are,
    which LoRAs are used and when TACA acts.

    stored: that pipeline, if it is opened already. mesh, stages, samples: as
    `Pipeline.from_pretrained` takes them. Raises UserError as that and `load_lora` do.
    """
    stored = stored or open_pipeline(config.base, config.tokenizers)
    formats = config.dtype, config.quantize, config.quantize_text
    say_fact("base", describe_base(config.base, stored, *formats))
    pipeline = Pipeline.from_pretrained(
        stored,
        dtype=config.dtype,
        mesh=mesh,
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
        times = pipeline.timesteps(config.height, config.width, config.steps)
        print_once(wrapped(describe_steps(config.taca, times)))
    return pipeline


def _drawn(
    pipeline: Pipeline, config: GenerateConfig, variants: Sequence[Variant], size: int
) -> Iterator[Image.Image]:
    """All pictures of the first variant, then those of the next; each batch when it is ready, or in
    stages when all are drawn."""
    count = config.num_images
    text = pipeline.embeds(config.prompt, config.negative_prompt, guidance=config.guidance)
    batches = [(variant, start) for variant in variants for start in range(0, count, size)]

    def call(variant: Variant, start: int, output: Output) -> PipelineOutput:
        # The last batch is filled up, so that all batches run the same compiled program.
        left = min(size, count - start)
        return pipeline(
            **text,
            height=config.height,
            width=config.width,
            steps=config.steps,
            guidance=config.guidance,
            seed=config.seed + start,
            num_images=size,
            taca=variant.taca,
            lora_strength=variant.lora_strength,
            output=output,
            tiling=config.tiling,
            preview=None if config.preview is None else partial(_write_preview, config, left),
            progress=config.progress,
        )

    def wanted(images: list[Image.Image] | np.ndarray | None, start: int) -> list[Image.Image]:
        assert isinstance(images, list)  # output="pil"
        return images[: count - start]

    if not pipeline.staged:
        for variant, start in batches:
            yield from wanted(call(variant, start, "pil").images, start)
        return
    drawn = [on_host(call(*batch, "latents").latents) for batch in batches]
    for (_, start), latents in zip(batches, drawn, strict=True):
        yield from wanted(pipeline.decode(jnp.asarray(latents), tiling=config.tiling), start)


def preview_path(config: GenerateConfig) -> Path:
    """The file of previews; each one overwrites the last."""
    out = Path(config.out)
    return out.with_stem(f"{out.stem}-preview")


def _write_preview(
    config: GenerateConfig, count: int, step: int, pictures: list[Image.Image]
) -> None:
    """Writes the first `count` pictures of a batch side by side."""
    del step
    if not is_first():
        return
    pictures = [enlarged(picture) for picture in pictures[:count]]
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * width, 0))
    with whole_file(preview_path(config)) as file:
        row.save(file, format="PNG")


def _describe(taca: TacaConfig | None) -> str:
    return "plain" if taca is None else f"TACA, {describe_gamma(taca)}"


def _names(config: GenerateConfig) -> list[Path]:
    """The files to write; the names of several pictures are numbered."""
    out, count = Path(config.out), config.num_images
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i:03d}") for i in range(count)]


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """The metadata of a picture that was drawn with these settings, with our version."""
    info = PngInfo()
    info.add_itxt("taca_jax", json.dumps({"taca_jax": version("taca-jax"), **settings}))
    return info


def _write(path: Path, picture: Image.Image, config: GenerateConfig) -> None:
    if not is_first():
        return
    info = png_info(to_tree(config))
    shown = enlarged(picture)
    with whole_file(path) as file:
        shown.save(file, format="PNG", pnginfo=info)
    factor = shown.width // picture.width
    times = "" if factor == 1 else f" ({picture.width} x {picture.height} pixels, {factor} times)"
    print(f"wrote {path}{times}")
