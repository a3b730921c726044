"""The stage before training that encodes every picture and caption once, on all devices.

An interrupted stage continues where it stopped, and a complete cache serves every run with the same
data and encoders.
"""

import glob
import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from taca_jax.config.fields import show
from taca_jax.config.json_text import to_json
from taca_jax.data.cache.files import encoded, write_sizes
from taca_jax.data.cache.manifest import Manifest, differences, picture_fields, read_manifest
from taca_jax.data.cache.prompts import read_prompts, write_prompts
from taca_jax.data.cache.reader import Cache, read_buckets
from taca_jax.data.cache.writer import CacheWriter, write_empty_caption
from taca_jax.data.sources.mixing import parts_of, summaries
from taca_jax.data.sources.source import Source
from taca_jax.data.sources.stored_scans import stamp_of
from taca_jax.errors import UserError
from taca_jax.nn.kinds import kind_of
from taca_jax.parallel.processes import all_of, is_first, wait_for_all
from taca_jax.pipelines.text import encoders_by_folder
from taca_jax.storage.places import Place, reach
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.training.checkpoints import sum_of
from taca_jax.training.config import TrainConfig
from taca_jax.training.encoding import Encoders, encode_to
from taca_jax.training.models import InputModels, RunModels
from taca_jax.training.run_data import Examples, open_data
from taca_jax.training.signals import Notice
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE
from taca_jax.weights.original_pipelines import TOKENIZERS
from taca_jax.weights.pipeline_folders import AUTOENCODER, TRANSFORMER

_PROBE = "Two red cups, left of a blue book: ½ é 漢字"
"""A text that different tokenizers most likely encode differently."""


def check_cache(models: RunModels) -> Examples[Source] | None:
    """The pictures that are to be encoded; None if `config.cache_dir` has a complete cache.

    No model is loaded. Raises UserError for a cache of other models or pictures, as far as the
    configs of the models show it.
    """
    config, folder = models.config, models.config.cache_dir
    manifest = _manifest_of_all(folder)
    if manifest is None:
        return open_data(models)
    _check_data(config, folder, manifest)
    if manifest.files != _files_stamp(models):
        names = [*models.reading.folders, AUTOENCODER]
        known = {name: _described(models.stored.models[name].config) for name in names}
        made_with = {
            name: {key: value for key, value in found.items() if key != "sum"}
            for name, found in manifest.made_with.items()
            if isinstance(found, dict)  # not the tokenizer's digest
        }
        _check_models(folder, replace(manifest, made_with=made_with), known)
    if all_of(manifest.examples == len(encoded(folder))):
        return None
    opened = open_data(models)
    _check_sources(folder, manifest, opened.source)
    return opened


def ready_cache(models: RunModels, notice: Notice, opened: Examples[Source] | None = None) -> Cache:
    """The cache in `config.cache_dir`, created or completed first if necessary.

    opened: the pictures, if they are open already (`check_cache`).
    Models are loaded only to encode, or to compare them if their files have changed, and are freed
    when this returns. Raises UserError for a cache of other models or pictures, and StoppedError if
    the run was asked to stop, after everything encoded so far has been written.
    """
    config = models.config
    folder = config.cache_dir
    stamp = _files_stamp(models)
    manifest = _manifest_of_all(folder)
    if manifest is not None:
        _check_data(config, folder, manifest)
    complete = all_of(manifest is not None and manifest.examples == len(encoded(folder)))
    same_files = all_of(manifest is not None and manifest.files == stamp)
    lacks_prompts = config.sample_every > 0 and not all_of(not _lacking_prompts(config))
    if manifest is None or not complete or not same_files or lacks_prompts:
        # Not loaded at all for a complete cache of the same files.
        inputs = models.load_inputs()
        if lacks_prompts:
            # Prompts that cannot be tokenized fail now, and not when all pictures are encoded.
            inputs.tokenizer(config.sample_prompts)
        made_with = _made_with(inputs)
        if manifest is not None:
            _check_models(folder, manifest, made_with)
        if manifest is None or not complete:
            opened = open_data(models) if opened is None else opened
            manifest = _encode_all(models, inputs, opened, made_with, stamp, manifest, notice)
        elif is_first():  # the files were copied or touched, but hold the same models
            replace(manifest, files=stamp).write(folder)
        if lacks_prompts:
            _add_prompts(models, inputs)
        wait_for_all("a complete cache")
    return Cache(folder, manifest)


def _lacking_prompts(config: TrainConfig) -> list[str]:
    """The prompts to draw samples of that are not in the cache."""
    there = read_prompts(config.cache_dir)
    return [prompt for prompt in dict.fromkeys(config.sample_prompts) if prompt not in there]


def _add_prompts(models: RunModels, inputs: InputModels) -> None:
    """Encodes the prompts to draw samples of that are not in the cache, and adds them to it."""
    config, folder = models.config, models.config.cache_dir
    lacking = _lacking_prompts(config)
    encoders = Encoders(inputs, models.mesh, config.data.batch_size, config.dtype)
    found = dict(zip(lacking, encoders.captions(lacking), strict=True))
    wait_for_all("the prompts of a cache")  # all have read which are lacking
    if not is_first():
        return
    there = read_prompts(folder)
    if there:
        print(f"{folder} was made for other sample_prompts: encoded and added {', '.join(lacking)}")
    write_prompts(folder, there | found)


def _manifest_of_all(folder: Place) -> Manifest | None:
    """The manifest of the cache in a folder; None where there is no cache yet.

    What follows synchronises the processes, so that all of them must take the same branches: raises
    UserError if some of them have a cache and others none, and for a bucket that cannot be reached.
    """
    reach(folder)
    manifest = read_manifest(folder)
    if not all_of(manifest is None) and not all_of(manifest is not None):
        raise UserError(
            f"{folder} holds a cache for some processes and none for others; give a data.cache "
            "that all of them share"
        )
    return manifest


def _check_data(config: TrainConfig, folder: Place, manifest: Manifest) -> None:
    asked = picture_fields(config.data)
    if changed := differences(manifest.data, asked):
        name = changed[0]
        raise UserError(
            f"{folder} was made with data.{name}={_shown(manifest.data.get(name))}, now it is "
            f"{_shown(asked.get(name))}; give another data.cache, or the same data"
        )
    if manifest.dtype != config.dtype:
        raise UserError(
            f"{folder} was made with dtype={manifest.dtype}, now it is {config.dtype}; give "
            "another data.cache, or the same dtype"
        )


def _check_models(folder: Place, manifest: Manifest, made_with: dict[str, Any]) -> None:
    if changed := differences(manifest.made_with, made_with):
        name = changed[0]
        raise UserError(
            f"{folder} was made with another {name} ({_shown(manifest.made_with.get(name))}, now "
            f"{_shown(made_with.get(name))}); give another data.cache, or the weights it was made "
            "with"
        )


def _check_sources(folder: Place, begun: Manifest, source: Source) -> None:
    """Raises UserError unless a cache was begun with as many pictures: its shards are of the same
    source."""
    now = [len(part) for part in parts_of(source)]
    if begun.sources != now:
        raise UserError(
            f"{folder} was begun with {sum(begun.sources)} pictures, now there are {sum(now)}; "
            "remove it to encode anew"
        )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return ",".join(value) if isinstance(value, list) else show(value)


def _made_with(inputs: InputModels) -> dict[str, Any]:
    """For each encoder its kind, a checksum of its parameters and a digest of its config; for the
    tokenizer a digest of what it makes of _PROBE."""
    found: dict[str, Any] = {}
    models = {**encoders_by_folder(inputs.text_encoder), AUTOENCODER: inputs.autoencoder}
    for name, model in models.items():
        kind, config = _described(model.config).values()
        found[name] = {"kind": kind, "sum": sum_of(nnx.state(model)), "config": config}
    found["tokenizer"] = _digest(_probed(inputs.tokenizer).tobytes())
    return found


def _described(config: Any) -> dict[str, str]:
    """What is known of a model without its parameters: its kind, and a digest of its config."""
    return {"kind": kind_of(config).name, "config": _digest(to_json(config).encode())}


def _probed(tokenizer: Tokenizer) -> np.ndarray:
    """What a tokenizer makes of a few texts, int32."""
    try:
        return np.asarray(tokenizer([_PROBE, ""]), np.int32)
    except UserError:  # it knows the words of shapes only
        return np.asarray(tokenizer([""]), np.int32)


def _files_stamp(models: RunModels) -> str:
    """A digest of the names, sizes and times of all files that the encoders are read from, and of
    the format of their kernels."""
    stored = models.stored
    read = [model.where for name, model in stored.models.items() if name != TRANSFORMER]
    roots = [Path(each) for each in read]
    roots += [stored.where / PIPELINE_FILE, *(stored.tokenizers / name for name in TOKENIZERS)]
    files = sorted({file for root in roots for file in _files_of(root)})
    return _digest(b"".join(map(stamp_of, files)) + models.config.quantize_text.encode())


def _files_of(root: Path) -> list[Path]:
    """The files of a model: a folder's, a file with those beside it if they have a config, or those
    whose names begin with `root`."""
    if (root.parent / CONFIG).is_file() and root.is_file():
        root = root.parent
    if root.is_dir():
        return [root, *root.rglob("*")]
    return [root, *root.parent.glob(f"{glob.escape(root.name)}_*")]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _encode_all(
    models: RunModels,
    inputs: InputModels,
    opened: Examples[Source],
    made_with: dict[str, Any],
    stamp: str,
    before: Manifest | None,
    notice: Notice,
) -> Manifest:
    """Encodes everything that is not in the cache yet and returns the completed manifest; `before`
    is the manifest of a cache that was begun earlier."""
    config = models.config
    data, folder, source = config.data, config.cache_dir, opened.source
    encoders = Encoders(inputs, models.mesh, data.batch_size, config.dtype)
    (empty,) = encoders.captions([""])
    manifest = Manifest(
        made_with=made_with,
        files=stamp,
        data=picture_fields(data),
        sources=[len(part) for part in parts_of(source)],
        dtype=config.dtype,
        latents_dtype=encoders.latents_dtype,
        channels=encoders.channels,
        downscale=encoders.downscale,
        moments=encoders.moments,
        text=list(empty["txt"].shape),
        pooled=list(empty["pooled"].shape),
    )
    if before is not None:
        _check_sources(folder, before, source)
    elif is_first():
        write_empty_caption(folder, empty)
        write_sizes(folder, opened.buckets, len(source), data.resolution)
        manifest.write(folder)
    wait_for_all("the start of a cache")
    # The buckets of the cache's beginning, whatever the batch size is now.
    buckets = read_buckets(folder, manifest)
    prefix = "" if jax.process_count() == 1 else f"{jax.process_index():04}-"
    done = encoded(folder)
    wait_for_all("the examples that are left")
    with notice.steps():
        with CacheWriter(folder, prefix) as writer:
            whole = encode_to(writer, source, buckets, encoders, done=done, stopping=notice.reached)
        wait_for_all("the shards of a cache")
        if not whole:
            raise notice.stopped(f"{len(encoded(folder))} pictures are encoded")
    for line in summaries(source):
        print(line, file=sys.stderr)
    manifest = replace(manifest, examples=len(encoded(folder)))
    if is_first():
        manifest.write(folder)
    return manifest
