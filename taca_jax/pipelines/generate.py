"""Draws pictures from a prompt and writes them with their settings."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taca_jax.config.json_text import to_tree
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.parallel.processes import print_once
from taca_jax.pipelines.config import GenerateConfig, SamplingConfig, Variant
from taca_jax.pipelines.grids import caption_grid, enlarged
from taca_jax.pipelines.loras import check_lora, used_loras
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.previews import open_previewer
from taca_jax.taca import TacaConfig, describe_gamma, describe_steps


def generate(config: GenerateConfig) -> list[Path]:
    """Draws as configured and returns the files written, in which small pictures are enlarged.

    Raises UserError for problems that the user can fix.
    """
    if not config.prompt:
        raise UserError('prompt is empty; say what to draw: prompt="a red circle"')
    out = Path(config.out)
    if not out.parent.is_dir():
        raise UserError(f"out={out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name a file in it")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"out={out}: the folder {out.parent} cannot be written to")
    check_lora(config)  # before the model loads
    if config.preview not in (None, OWN):
        open_previewer(config.preview)  # also before the model loads
    pipeline = load_pipeline(config)
    if config.preview is not None:
        if config.preview != OWN:
            pipeline.load_previewer(config.preview)
        print(f"previews: {preview_path(config)}, after each step")
    if not config.compare:
        drawn_as = Variant(_describe(config.taca), config.taca, 1.0)
        names = [out] if config.num_images == 1 else _numbered(out, config.num_images)
        for name, picture in zip(names, _draw(pipeline, config, drawn_as), strict=True):
            _write(name, picture, config)
        return names

    without = tuple(float(lora.gate == "always") for lora in pipeline.loras)
    columns = [
        Variant("plain", None, without),
        Variant(_describe(config.taca), config.taca, without),
    ]
    if not all(without):
        columns.append(Variant("TACA + LoRA", config.taca, 1.0))
    drawn = [_draw(pipeline, config, column) for column in columns]
    captions = [f"{config.prompt} (seed {config.seed + i})" for i in range(config.num_images)]
    grid = caption_grid(
        [pictures[i] for i in range(config.num_images) for pictures in drawn],
        [caption for caption in captions for _ in columns],
        columns=len(columns),
        headings=[column.name for column in columns],
    )
    _write(out, grid, config)
    return [out]


def local_mesh() -> Mesh | None:
    """A mesh over this process's devices, which share the samples and the parameters; None if there
    is one device in all."""
    if len(jax.devices()) == 1:
        return None
    return make_mesh(MeshConfig(), jax.local_devices())


def load_pipeline(config: SamplingConfig, mesh: Mesh | None = None) -> Pipeline:
    """The pipeline that is configured, with its LoRAs; says which they are and when TACA acts.

    Raises UserError as `Pipeline.from_pretrained` and `load_lora` do.
    """
    pipeline = Pipeline.from_pretrained(
        config.base,
        dtype=config.dtype,
        mesh=mesh,
        quantize=config.quantize,
        quantize_text=config.quantize_text,
        attention=config.attention,
        tokenizers=config.tokenizers,
    )
    used = used_loras(config)
    for choice in config.lora_choices:
        if choice in used:
            print_once(f"LoRA: {pipeline.load_lora(choice)}")
        else:
            print_once(f"LoRA: {choice.path} is not used: it acts only while TACA does (taca=none)")
    if config.taca is not None:
        times = pipeline.timesteps(config.height, config.width, config.steps)
        print_once(describe_steps(config.taca, times))
    return pipeline


def _draw(pipeline: Pipeline, config: GenerateConfig, variant: Variant) -> Sequence[Image.Image]:
    images = pipeline(
        config.prompt,
        config.negative_prompt,
        height=config.height,
        width=config.width,
        steps=config.steps,
        guidance=config.guidance,
        seed=config.seed,
        num_images=config.num_images,
        taca=variant.taca,
        lora_strength=variant.lora_strength,
        tiling=config.tiling,
        preview=None if config.preview is None else partial(_write_preview, preview_path(config)),
        progress=config.progress,
    ).images
    assert isinstance(images, list)  # output="pil"
    return images


OWN = "own"
"""The value of `preview` for the model's own autoencoder."""


def preview_path(config: GenerateConfig) -> Path:
    """The file of previews; each one overwrites the last."""
    out = Path(config.out)
    return out.with_stem(f"{out.stem}-preview")


def _write_preview(path: Path, step: int, pictures: list[Image.Image]) -> None:
    """Writes all pictures of the run side by side."""
    del step
    pictures = [enlarged(picture) for picture in pictures]
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * width, 0))
    with whole_file(path) as file:
        row.save(file, format="PNG")


def _describe(taca: TacaConfig | None) -> str:
    return "plain" if taca is None else f"TACA, {describe_gamma(taca)}"


def _numbered(out: Path, count: int) -> list[Path]:
    return [out.with_stem(f"{out.stem}-{i:03d}") for i in range(count)]


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """The metadata of a picture that was drawn with these settings, with our version."""
    info = PngInfo()
    info.add_itxt("taca_jax", json.dumps({"taca_jax": version("taca-jax"), **settings}))
    return info


def _write(path: Path, picture: Image.Image, config: GenerateConfig) -> None:
    info = png_info(to_tree(config))
    shown = enlarged(picture)
    with whole_file(path) as file:
        shown.save(file, format="PNG", pnginfo=info)
    factor = shown.width // picture.width
    times = "" if factor == 1 else f" ({picture.width} x {picture.height} pixels, {factor} times)"
    print(f"wrote {path}{times}")
