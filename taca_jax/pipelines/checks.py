"""What is wrong with a command that draws, as far as configs and headers of files show it.

What this machine shows is looked at first, then headers of models that are on the hub or in a
bucket; no weights are read, nor fetched before all is found right, so that a mistake is reported
within seconds, however large the model is. Each check is the one that would fail later.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax

from taca_jax.autoencoders.pixels import PixelsConfig
from taca_jax.errors import UserError
from taca_jax.parallel.mesh import check_heads, make_mesh
from taca_jax.parallel.processes import is_first
from taca_jax.pipelines.batching import with_model_values
from taca_jax.pipelines.config import GenerateConfig, SamplingConfig
from taca_jax.pipelines.image_inputs import read_image
from taca_jax.pipelines.inputs import check_guidance, check_negative
from taca_jax.pipelines.loras import check_lora, check_loras_fit, fetch_loras
from taca_jax.pipelines.opening import check_autoencoder, size_in, tokens_in
from taca_jax.pipelines.previews import OWN, check_own_previewer, open_previewer
from taca_jax.pipelines.prompt_lists import Lines, pictures_in_list
from taca_jax.pipelines.text import find_tokenizers, lacks_encoders, load_tokenizers
from taca_jax.storage.places import Place, in_bucket, place, reach
from taca_jax.weights.headers import headers_alone
from taca_jax.weights.hub_files import model_files
from taca_jax.weights.pipeline_folders import AUTOENCODER, StoredPipeline, open_pipeline
from taca_jax.weights.shipped import find_weights, is_far

_ANY_SIZE = (8, 8)
"""Of a picture that is read only to see that it can be."""

Found = TypeVar("Found")


def check_drawing(config: GenerateConfig) -> StoredPipeline:
    """The pipeline that `generate.py` is to draw a prompt with, opened and not loaded.

    Raises UserError for all that needs no weights to be found: an `out` that cannot be written, an
    image to start from that cannot be read, and what `check_sampling` finds, of previews and tiles
    too.
    """
    if not config.prompt:
        raise UserError('prompt is empty; say what to draw: prompt="a red circle"')

    def pictures(stored: StoredPipeline) -> list[GenerateConfig]:
        return [with_model_values(config, stored.settings)]

    stored, _ = _checked(config, [config.prompt], pictures, jax.devices, is_folder=False)
    return stored


def check_list(config: GenerateConfig, lines: Lines) -> tuple[StoredPipeline, list[GenerateConfig]]:
    """The same for a list of prompts, which each process draws a share of; and its pictures.

    Raises UserError as `check_drawing` and `pictures_in_list` do.
    """
    pictures = partial(pictures_in_list, config, lines)
    is_folder = not config.out.endswith(".png")
    return _checked(config, [], pictures, jax.local_devices, is_folder=is_folder)


def _checked(
    config: GenerateConfig,
    prompts: list[str],
    pictures: Callable[[StoredPipeline], list[GenerateConfig]],
    devices: Callable[[], Sequence[Any]],
    *,
    is_folder: bool,
) -> tuple[StoredPipeline, list[GenerateConfig]]:
    if is_first():
        _check_out(place(config.out), is_folder=is_folder)
    if config.image is not None:
        read_image(config.image, _ANY_SIZE)
    if config.negative_prompt is not None:
        prompts = [*prompts, config.negative_prompt]
    preview = None if config.preview == OWN else config.preview
    if preview is not None and not is_far(preview, model_files):
        open_previewer(preview)

    def check(stored: StoredPipeline) -> list[GenerateConfig]:
        _check_pictures(config, stored)
        check_sampling(config, stored, prompts, devices())
        found = pictures(stored)
        _check_images(found)
        return found

    return _opened([config], check, () if preview is None else (preview,))


def check_evaluation(
    config: SamplingConfig, prompts: Sequence[str] = (), loras: Sequence[str] = ()
) -> StoredPipeline:
    """The pipeline that an evaluation is to draw `prompts` with, on the devices of this process;
    opened and not loaded.

    loras: what else it draws with, each as `config.lora`. Raises UserError as `check_sampling`
    does.
    """
    others = [replace(config, lora=lora) for lora in loras]

    def check(stored: StoredPipeline) -> None:
        check_sampling(config, stored, prompts, jax.local_devices())
        for other in others:
            check_loras_fit(other, stored)

    stored, _ = _opened([config, *others], check)
    return stored


def _opened(
    configs: Sequence[SamplingConfig],
    check: Callable[[StoredPipeline], Found],
    beside: Sequence[str] = (),
) -> tuple[StoredPipeline, Found]:
    """The pipeline of the first of the configurations, which differ in their LoRAs, and what
    `check` returns of it, which sees a model of the hub or of a bucket by its headers.

    beside: other models, which `check` looks at. Then what is not here is fetched, what is small
    first: that a LoRA cannot be had is said before a base is fetched for an hour.
    """
    config = configs[0]
    for each in configs:
        check_lora(each)
    with headers_alone(config.base) as base:
        stored = open_pipeline(base, config.tokenizers)
        found = check(stored)
    for each in configs:
        fetch_loras(each)
    for path in beside:
        find_weights(path, model_files)
    if base != config.base:
        stored = open_pipeline(config.base, config.tokenizers)
    return stored, found


def check_sampling(
    config: SamplingConfig,
    stored: StoredPipeline,
    prompts: Sequence[str],
    devices: Sequence[Any],
) -> None:
    """Raises UserError for what would keep a pipeline from drawing as configured on `devices`:
    files that are damaged or lack something, models, LoRAs, sizes or a mesh that do not fit
    together, prompts that cannot be read."""
    check_autoencoder(stored)
    if _autoencoder(stored) is None:
        raise UserError(
            f"{stored.where} has no autoencoder, which pictures are made with; put its folder "
            "autoencoder/ (of a diffusers folder vae/, beside a single file ae.safetensors) there"
        )
    reading = stored.reading
    if reading is None:
        raise lacks_encoders(stored.family)
    tokens_in(stored, config.height, config.width)
    check_loras_fit(config, stored)
    for model in stored.models.values():
        model.check()
    find_tokenizers(stored, reading)
    # What follows takes a second or two: devices are found, and tokenizers of the hub read.
    check_heads(make_mesh(config.mesh, devices), stored.transformer.config.num_heads)
    tokenizer = load_tokenizers(stored, reading)
    if prompts:
        tokenizer(prompts)


def _check_pictures(config: GenerateConfig, stored: StoredPipeline) -> None:
    """Raises UserError for what only generate.py takes and this model does not."""
    transformer, autoencoder = stored.transformer.config, _autoencoder(stored)
    family = stored.family
    guidance = stored.settings.guidance if config.guidance is None else config.guidance
    check_guidance(guidance)
    if config.negative_prompt is not None:
        check_negative(guidance, embedded=family.embeds_guidance(transformer))
    if config.preview == OWN:
        check_own_previewer(autoencoder, family.tiny_autoencoder)
    elif config.preview is not None:
        with headers_alone(config.preview, model_files) as preview:
            open_previewer(preview, transformer.latent_channels).check()
    tiling = config.tiling
    if tiling is None or autoencoder is None or isinstance(autoencoder, PixelsConfig):
        return
    if tiling.is_for(*size_in(stored, config.height, config.width)):
        tiling.in_latents(autoencoder.downscale)


def _autoencoder(stored: StoredPipeline) -> Any:
    found = stored.models.get(AUTOENCODER)
    return None if found is None else found.config


def _check_images(pictures: Sequence[GenerateConfig]) -> None:
    """Raises UserError for an image to start from that cannot be read, of pictures with sizes."""
    for image, height, width in {(each.image, each.height, each.width) for each in pictures}:
        if image is not None:
            assert height is not None
            assert width is not None
            read_image(image, (height, width))


def _check_out(out: Place, *, is_folder: bool) -> None:
    """Raises UserError unless the file can be written, or the folder be made and written to."""
    if in_bucket(out):
        reach(out)
        return
    if is_folder:
        there = next(each for each in (out, *out.absolute().parents) if each.exists())
        if not there.is_dir():
            raise UserError(f"out={out}: {there} is a file; name a folder, or a .png file")
    else:
        there = out.parent
        if not there.is_dir():
            raise UserError(f"out={out}: the folder {there} does not exist")
        if out.is_dir():
            raise UserError(f"out={out} is a folder; name a file in it")
    if not os.access(there, os.W_OK):
        raise UserError(f"out={out}: the folder {there} cannot be written to")
