"""Draws pictures from a prompt and writes them with their settings."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taca_jax.config.json_text import to_tree
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.parallel.processes import (
    do_not_wait_at_exit,
    is_first,
    join_processes,
    on_host,
    print_once,
)
from taca_jax.pipelines.config import GenerateConfig, SamplingConfig, Variant
from taca_jax.pipelines.decoding import Output
from taca_jax.pipelines.grids import caption_grid, enlarged
from taca_jax.pipelines.inputs import NO_DOWNSCALE, picture_size
from taca_jax.pipelines.loras import check_lora, used_loras
from taca_jax.pipelines.opening import samples_of
from taca_jax.pipelines.pipeline import Pipeline, PipelineOutput
from taca_jax.pipelines.previews import open_previewer
from taca_jax.storage.places import Place, in_bucket, place, reach
from taca_jax.taca import TacaConfig, describe_gamma, describe_steps
from taca_jax.weights.pipeline_folders import AUTOENCODER, StoredPipeline, open_pipeline

TOKENS_TOGETHER = 4096
"""Image tokens that are drawn at a time on each device, unless batch_size says otherwise. More
would take memory, and no more time would be saved: matrix units are busy with this many."""


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
    if not config.prompt:
        raise UserError('prompt is empty; say what to draw: prompt="a red circle"')
    if is_first():
        _check_out(place(config.out))
    check_lora(config)  # before the model loads
    if config.preview not in (None, OWN):
        open_previewer(config.preview)  # also before the model loads
    stored = open_pipeline(config.base, config.tokenizers)
    size = batch_size(config, stored, len(jax.devices()))
    pipeline = load_pipeline(
        config,
        config.mesh,
        stored=stored,
        stages=config.stages,
        samples=samples_of(stored, size, config.guidance),
    )
    _announce(pipeline, config, size)
    if config.preview is not None:
        if config.preview != OWN:
            pipeline.load_previewer(config.preview)
        print_once(f"previews: {preview_path(config)}, after each step")
    if config.compare:
        return [_compare(pipeline, config, size)]
    names = _names(config)
    variant = Variant(_describe(config.taca), config.taca, 1.0)
    for name, picture in zip(names, _drawn(pipeline, config, [variant], size), strict=True):
        _write(name, picture, config)
    return names


def _check_out(out: Place) -> None:
    """Raises UserError unless the file can be written."""
    if in_bucket(out):
        reach(out)
        return
    if not out.parent.is_dir():
        raise UserError(f"out={out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name a file in it")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"out={out}: the folder {out.parent} cannot be written to")


def batch_size(config: GenerateConfig, stored: StoredPipeline, devices: int) -> int:
    """How many pictures are drawn at a time: of several batches, all have this size."""
    most = config.batch_size
    if most is None:
        autoencoder = stored.models.get(AUTOENCODER)
        downscale = NO_DOWNSCALE if autoencoder is None else autoencoder.config.downscale
        side = downscale * stored.transformer.config.patch_size
        height, width = picture_size(config.height, config.width, stored.settings.resolution)
        tokens = max(1, (height // side) * (width // side))
        most = devices * max(1, TOKENS_TOGETHER // tokens)
    batches = -(-config.num_images // most)
    return -(-config.num_images // batches)


def _announce(pipeline: Pipeline, config: GenerateConfig, size: int) -> None:
    """Says on which devices, and in which batches and stages, the pictures are drawn."""
    if pipeline.mesh is not None:
        axes = ", ".join(f"{axis} {n}" for axis, n in pipeline.mesh.shape.items() if n > 1)
        print_once(f"{pipeline.mesh.size} devices: mesh of {axes}")
    if pipeline.staged:
        print_once("models take turns in memory: prompts are read, then all is drawn, then decoded")
    if size < config.num_images:
        print_once(f"{config.num_images} pictures in batches of {size} (batch_size)")


def _compare(pipeline: Pipeline, config: GenerateConfig, size: int) -> Place:
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
    out = place(config.out)
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
    """The pipeline that is configured, with its LoRAs; says which they are and when TACA acts.

    stored: that pipeline, if it is opened already. mesh, stages, samples: as
    `Pipeline.from_pretrained` takes them. Raises UserError as that and `load_lora` do.
    """
    pipeline = Pipeline.from_pretrained(
        stored or config.base,
        dtype=config.dtype,
        mesh=mesh,
        stages=stages,
        samples=samples,
        quantize=config.quantize,
        quantize_text=config.quantize_text,
        attention=config.attention,
        tokenizers=config.tokenizers,
    )
    used = used_loras(config)
    # All at once: in stages, a transformer that is read gets all of its LoRAs anew.
    if used:
        for said in pipeline.load_lora(used).splitlines():
            print_once(f"LoRA: {said}")
    for choice in config.lora_choices:
        if choice not in used:
            print_once(f"LoRA: {choice.path} is not used: it acts only while TACA does (taca=none)")
    if config.taca is not None:
        times = pipeline.timesteps(config.height, config.width, config.steps)
        print_once(describe_steps(config.taca, times))
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


OWN = "own"
"""The value of `preview` for the model's own autoencoder."""


def preview_path(config: GenerateConfig) -> Place:
    """The file of previews; each one overwrites the last."""
    out = place(config.out)
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


def _names(config: GenerateConfig) -> list[Place]:
    """The files to write; the names of several pictures are numbered."""
    out, count = place(config.out), config.num_images
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i:03d}") for i in range(count)]


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """The metadata of a picture that was drawn with these settings, with our version."""
    info = PngInfo()
    info.add_itxt("taca_jax", json.dumps({"taca_jax": version("taca-jax"), **settings}))
    return info


def _write(path: Place, picture: Image.Image, config: GenerateConfig) -> None:
    if not is_first():
        return
    info = png_info(to_tree(config))
    shown = enlarged(picture)
    with whole_file(path) as file:
        shown.save(file, format="PNG", pnginfo=info)
    factor = shown.width // picture.width
    times = "" if factor == 1 else f" ({picture.width} x {picture.height} pixels, {factor} times)"
    print(f"wrote {path}{times}")
