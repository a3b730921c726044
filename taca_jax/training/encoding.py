"""The stage before training that encodes every picture and caption once, with all devices.

It goes on where it was interrupted, and a complete cache is used again by any run that asks for the
same. Examples are encoded in batches of `data.batch_size`, each process those rows that its devices
hold; while a batch is encoded, the next ones are read and the one before is written.
"""

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import track

from taca_jax.autoencoders.vae import AutoencoderKL
from taca_jax.config.fields import to_json
from taca_jax.data.buckets import make_buckets
from taca_jax.data.cache import (
    Cache,
    CacheWriter,
    Caption,
    Manifest,
    differences,
    encoded,
    read_buckets,
    read_manifest,
    same_data,
    write_empty,
    write_sizes,
)
from taca_jax.data.loader import BATCHES_AHEAD, FILES_PER_CHUNK, MAX_THREADS, captions_of
from taca_jax.data.order import Bucket
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.base import Example, Source, cores
from taca_jax.data.sources.opening import open_source, parts_of, read_example, summaries
from taca_jax.data.sources.scans import stamp_of
from taca_jax.errors import UserError
from taca_jax.parallel.batches import batch_sharding, local_rows, own_rows, put_rows
from taca_jax.parallel.processes import (
    all_of,
    first_before_others,
    is_first,
    most_of_all,
    wait_for_all,
)
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.text import encoder_parts
from taca_jax.text.encoders import encode
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.training.build import build_pipeline
from taca_jax.training.checkpoints import sum_of
from taca_jax.training.config import TrainConfig
from taca_jax.training.signals import Notice
from taca_jax.weights.folders import kind_of
from taca_jax.weights.original_pipelines import BFL_AUTOENCODER
from taca_jax.weights.pipeline_folders import TRANSFORMER
from taca_jax.weights.shipped import find_weights

_PROBE = "Two red cups, left of a blue book: ½ é 漢字"
"""What tokenizers that differ read differently, most likely."""


def ready_cache(config: TrainConfig, mesh: Mesh | None, notice: Notice) -> Cache:
    """The cache of `config.cache_dir`, which is made or completed first where it is not there.

    Models are loaded only to encode, and to compare them where their files have changed, and are
    gone when this returns. Raises UserError for a cache of other models or pictures, and
    StoppedError when told to stop, once what was encoded is in the cache.
    """
    folder = config.cache_dir
    manifest = read_manifest(folder)
    stamp = _files_stamp(config)
    # What follows waits for all, so each step is one that all of them take.
    if not all_of(manifest is None) and not all_of(manifest is not None):
        raise UserError(
            f"{folder} holds a cache for some processes and none for others; give a data.cache "
            "that all of them share"
        )
    if manifest is not None:
        _check_data(config, folder, manifest)
    complete = all_of(manifest is not None and manifest.examples == len(encoded(folder)))
    same_files = all_of(manifest is not None and manifest.files == stamp)
    if manifest is None or not complete or not same_files:
        # Only here: on a complete cache of the same files nothing of this is in memory.
        pipeline = build_pipeline(config, mesh, only=("text", "autoencoder"))
        made_with = _made_with(pipeline)
        if manifest is not None:
            _check_models(folder, manifest, made_with)
        if manifest is None or not complete:
            manifest = _encode_all(config, pipeline, mesh, made_with, stamp, manifest, notice)
        elif is_first():  # copied, or touched: the same all the same
            replace(manifest, files=stamp).write(folder)
        wait_for_all("a complete cache")
    return Cache(folder, manifest)


def _check_data(config: TrainConfig, folder: Path, manifest: Manifest) -> None:
    asked = same_data(config.data)
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


def _check_models(folder: Path, manifest: Manifest, made_with: dict[str, Any]) -> None:
    if changed := differences(manifest.made_with, made_with):
        name = changed[0]
        raise UserError(
            f"{folder} was made with another {name} ({_shown(manifest.made_with.get(name))}, now "
            f"{_shown(made_with.get(name))}); give another data.cache, or the weights it was made "
            "with"
        )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return ",".join(value) if isinstance(value, list) else str(value)


def _made_with(pipeline: Pipeline) -> dict[str, Any]:
    """By part: its kind, the sum of its parameters and a digest of its config."""
    found: dict[str, Any] = {}
    assert pipeline.autoencoder is not None  # build_pipeline saw to them
    assert pipeline.tokenizer is not None
    models = {**encoder_parts(pipeline.text_encoder), "autoencoder": pipeline.autoencoder}
    for name, model in models.items():
        found[name] = {
            "kind": kind_of(model.config),
            "sum": sum_of(nnx.state(model)),
            "config": _digest(to_json(model.config).encode()),
        }
    found["tokenizer"] = _digest(np.asarray(pipeline.tokenizer([_PROBE, ""]), np.int32).tobytes())
    return found


def _files_stamp(config: TrainConfig) -> str:
    """A digest of the names, sizes and times of all files that encoders are read from, and of how
    they are kept."""
    assert config.base is not None  # a lora has one
    base = find_weights(config.base)
    if base.is_dir():  # all but the transformer
        roots = [each for each in base.iterdir() if each.name != TRANSFORMER]
    else:
        beside = ("text_encoder*", "tokenizer*", "vae", BFL_AUTOENCODER)
        roots = [base, *(each for names in beside for each in base.parent.glob(names))]
    if config.autoencoder != "pixels":
        roots.append(Path(config.autoencoder))
    files = sorted({file for root in roots for file in (root, *root.rglob("*"))})
    return _digest(b"".join(map(stamp_of, files)) + config.quantize_text.encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _encode_all(
    config: TrainConfig,
    pipeline: Pipeline,
    mesh: Mesh | None,
    made_with: dict[str, Any],
    stamp: str,
    before: Manifest | None,
    notice: Notice,
) -> Manifest:
    """Encodes what is not yet in the cache, which `before` says it is, and completes it."""
    data, folder = config.data, config.cache_dir
    with first_before_others("data that is made on first use"):
        source = open_source(data)
    encoders = Encoders(pipeline, mesh, data.batch_size, config.dtype)
    (empty,) = encoders.captions([""])
    manifest = Manifest(
        made_with=made_with,
        files=stamp,
        data=same_data(data),
        sources=[len(part) for part in parts_of(source)],
        dtype=config.dtype,
        latents_dtype=encoders.latents_dtype,
        channels=encoders.channels,
        downscale=encoders.downscale,
        moments=encoders.moments,
        text=list(empty["txt"].shape),
        pooled=list(empty["pooled"].shape),
    )
    # The source must still be the one that the shards there are of.
    if before is not None and before.sources != manifest.sources:
        raise UserError(
            f"{folder} was begun with {sum(before.sources)} pictures, now there are "
            f"{sum(manifest.sources)}; remove it to encode anew"
        )
    if before is None:
        multiple = encoders.downscale * pipeline.transformer.config.patch_size
        least = config.grad_accumulation * data.batch_size
        buckets = make_buckets(source, data, multiple=multiple, least=least)
        if is_first():
            write_empty(folder, empty)
            write_sizes(folder, buckets, len(source), data.resolution)
            manifest.write(folder)
    wait_for_all("the start of a cache")
    # As they were when it was begun, whatever the batches are now.
    buckets = read_buckets(folder, manifest)
    prefix = "" if jax.process_count() == 1 else f"{jax.process_index():04}-"
    done = encoded(folder)
    wait_for_all("the examples that are left")
    with notice.steps():
        with CacheWriter(folder, prefix) as writer:
            whole = encode_to(writer, source, buckets, encoders, done=done, told=notice.reached)
        wait_for_all("the shards of a cache")
        if not whole:
            raise notice.stopped(f"{len(encoded(folder))} pictures are encoded")
    for line in summaries(source):
        print(line, file=sys.stderr)
    manifest = replace(manifest, examples=len(encoded(folder)))
    if is_first():
        manifest.write(folder)
    return manifest


class Encoders:
    """The autoencoder and the text encoders of a pipeline, on the mesh, as programs for batches.

    Each is compiled for batches of `batch_size` samples: for each size of pictures, and for
    captions. A process gives and gets the rows that its devices hold; `own` says which of them no
    other process answers for.
    """

    def __init__(self, pipeline: Pipeline, mesh: Mesh | None, batch_size: int, dtype: DTypeLike):
        assert pipeline.autoencoder is not None  # build_pipeline saw to them
        assert pipeline.text_encoder is not None
        assert pipeline.tokenizer is not None
        autoencoder = pipeline.autoencoder
        self.batch_size = batch_size
        self.rows = np.arange(batch_size) if mesh is None else local_rows(mesh, batch_size)
        own = self.rows if mesh is None else own_rows(mesh, batch_size)
        self.own = np.isin(self.rows, own)
        self.moments = isinstance(autoencoder, AutoencoderKL)
        self.downscale = autoencoder.config.downscale
        self.channels = autoencoder.config.latent_channels
        self.tokenizer: Tokenizer = pipeline.tokenizer
        self._mesh = mesh
        ae_graph, self._autoencoder = nnx.split(autoencoder)
        text_graph, self._text_encoder = nnx.split(pipeline.text_encoder)
        dtype = jnp.dtype(dtype)
        # What models return as float32 they have computed in `dtype`, all but pixels.
        latents_dtype = dtype if jax.tree.leaves(self._autoencoder) else jnp.dtype(jnp.float32)
        self.latents_dtype: str = latents_dtype.name
        pad_id = self.tokenizer.pad_id

        def latents(state: nnx.State, images: jax.Array) -> tuple[jax.Array, ...]:
            model = nnx.merge(ae_graph, state)
            images = images.astype(jnp.float32) / 127.5 - 1
            kl = isinstance(model, AutoencoderKL)
            found = model.moments(images) if kl else (model.encode(images),)
            return tuple(each.astype(latents_dtype) for each in found)

        def text(state: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = encode(nnx.merge(text_graph, state), tokens, pad_id)
            return found.txt.astype(dtype), found.pooled.astype(jnp.float32)

        places = None if mesh is None else batch_sharding(mesh)
        self._latents = jax.jit(latents, out_shardings=places)
        self._text = jax.jit(text, out_shardings=places)

    def start(self, images: np.ndarray, tokens: np.ndarray) -> "Encoding":
        """Starts to encode this process's rows of a batch, and of as many captions as there are.

        images: uint8 [rows, H, W, 3]. tokens: int32 [n, t], any number of them.
        """
        rows = len(self.rows)
        rounds = most_of_all(-(-len(tokens) // rows))
        padded = np.zeros((rounds * rows, tokens.shape[1]), np.int32)
        padded[: len(tokens)] = tokens
        latents = self._latents(self._autoencoder, put_rows(images, self._mesh))
        texts = [
            self._text(self._text_encoder, put_rows(part, self._mesh))
            for part in np.split(padded, max(rounds, 1))
            if len(part)
        ]
        return Encoding(latents, texts, len(tokens))

    def captions(self, captions: Sequence[str]) -> list[Caption]:
        """The embeddings of a few captions, the same in every process."""
        tokens = np.repeat(self.tokenizer(captions), len(self.rows), axis=0)
        found = []
        for part in np.split(tokens, len(captions)):
            txt, pooled = map(_ours, self._text(self._text_encoder, put_rows(part, self._mesh)))
            found.append(Caption(txt=txt[0], pooled=pooled[0]))
        return found


@dataclass(frozen=True)
class Encoding:
    """A batch that has been started: its arrays are still on the devices."""

    latents: tuple[jax.Array, ...]
    texts: list[tuple[jax.Array, jax.Array]]
    count: int

    def get(self) -> tuple[list[np.ndarray], list[Caption]]:
        """Waits for this process's latents, arrays [rows, h, w, c], and its captions'."""
        latents = [_ours(array) for array in self.latents]
        captions = [
            Caption(txt=txt, pooled=pooled)
            for text in self.texts
            for txt, pooled in zip(*map(_ours, text), strict=True)
        ]
        return latents, captions[: self.count]


@dataclass(frozen=True)
class _Ready:
    """This process's rows of a batch as they were read; `examples` None where a row is empty."""

    images: np.ndarray
    indices: list[int]
    examples: list[Example | None]
    tokens: np.ndarray
    counts: list[int]
    """How many captions each row has."""


def encode_to(
    writer: CacheWriter,
    source: Source,
    buckets: Sequence[Bucket],
    encoders: Encoders,
    *,
    done: np.ndarray,
    told: Callable[[], bool],
) -> bool:
    """Encodes all examples of the buckets but those that are `done`, and writes them.

    Returns whether that was all: False where it was `told` to stop before, which it asks after each
    batch.
    """
    batches = _batches(buckets, done, encoders.batch_size)
    ready = _read_ahead(source, batches, encoders)
    shown = track(
        ready,
        "encoding",
        len(batches),
        console=Console(stderr=True),
        disable=not is_first() or not batches,
    )
    before: tuple[_Ready, Encoding] | None = None
    writing: Future[None] | None = None
    left = len(batches)
    with ThreadPoolExecutor(1) as pool:
        for batch in shown:
            started = (batch, encoders.start(batch.images, batch.tokens))
            # The batch before is fetched and written while this one is encoded.
            if writing is not None:
                writing.result()
            if before is not None:
                writing = pool.submit(_write, writer, encoders.own, *before)
            before = started
            left -= 1
            if told() and left:
                break
        if writing is not None:
            writing.result()
        if before is not None:
            _write(writer, encoders.own, *before)
    return left == 0


def _write(writer: CacheWriter, own: np.ndarray, batch: _Ready, encoding: Encoding) -> None:
    latents, captions = encoding.get()
    start = 0
    for row, (index, example, count) in enumerate(
        zip(batch.indices, batch.examples, batch.counts, strict=True)
    ):
        if example is not None and own[row]:
            parts = [array[row] for array in latents]
            writer.add(index, example["id"], parts, captions[start : start + count])
        start += count


def _batches(
    buckets: Sequence[Bucket], done: np.ndarray, size: int
) -> list[tuple[Bucket, np.ndarray]]:
    """Indices in their order, `size` of a bucket at a time; its last batch may be shorter."""
    found = []
    for bucket in buckets:
        members = np.setdiff1d(np.concatenate(bucket.parts), done)
        parts = np.split(members, range(size, len(members), size)) if len(members) else []
        found += [(bucket, part) for part in parts]
    return found


def _read_ahead(
    source: Source, batches: Sequence[tuple[Bucket, np.ndarray]], encoders: Encoders
) -> Iterator[_Ready]:
    """This process's rows of the batches, read by threads, some batches ahead."""
    rows, lock = encoders.rows, threading.Lock()
    pieces = -(-len(rows) // FILES_PER_CHUNK)
    read = partial(_read, source, batches, encoders.tokenizer, lock)
    chunks = grain.MapDataset.range(len(batches) * pieces).map(
        lambda i: read(i // pieces, np.array_split(rows, pieces)[i % pieces])
    )
    threads = min(cores(), MAX_THREADS)
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, BATCHES_AHEAD * pieces)
    )
    reading = iter(chunks.to_iter_dataset(options))
    try:
        for _ in batches:
            parts = [next(reading) for _ in range(pieces)]
            yield _Ready(
                np.concatenate([part.images for part in parts]),
                [index for part in parts for index in part.indices],
                [example for part in parts for example in part.examples],
                np.concatenate([part.tokens for part in parts]),
                [count for part in parts for count in part.counts],
            )
    finally:
        reading.close()


def _read(
    source: Source,
    batches: Sequence[tuple[Bucket, np.ndarray]],
    tokenizer: Tokenizer,
    lock: threading.Lock,
    number: int,
    rows: np.ndarray,
) -> _Ready:
    """Some rows of a batch; those behind its end, and bad ones, are empty."""
    bucket, members = batches[number]
    indices = [int(members[row]) if row < len(members) else -1 for row in rows]
    examples: list[Example | None] = []
    for index in indices:
        try:
            examples.append(None if index < 0 else read_example(source, index, bucket.size))
        except BadExampleError:  # the source has counted and logged it
            examples.append(None)
    captions = [() if example is None else captions_of(example) for example in examples]
    texts = [text for each in captions for text in each]
    with lock:  # Rust tokenizers refuse two threads at a time
        tokens = np.asarray(tokenizer(texts or [""]), np.int32)[: len(texts)]
    assert bucket.size is not None  # as caches keep them
    images = np.zeros((len(rows), *bucket.size, 3), np.uint8)
    for image, example in zip(images, examples, strict=True):
        if example is not None:
            image[:] = example["image"]
    return _Ready(images, indices, examples, tokens, [len(each) for each in captions])


def _ours(array: jax.Array) -> np.ndarray:
    """The rows of an array that this process's devices hold, in order."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
