"""Encodes pictures and captions into latents and embeddings, and writes them to a cache.

While a batch is encoded, the next ones are read and the previous one is written. Each process
encodes the rows that its devices hold.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from taca_jax.autoencoders.kinds import Autoencoder
from taca_jax.autoencoders.vae import AutoencoderKL
from taca_jax.data.cache.writer import CacheWriter, Caption
from taca_jax.data.loader import BATCHES_AHEAD, FILES_PER_CHUNK, MAX_THREADS
from taca_jax.data.order import Bucket
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.mixing import read_example
from taca_jax.data.sources.source import Example, Source, captions_of
from taca_jax.data.threads import usable_cores
from taca_jax.parallel.batches import batch_sharding, local_rows, own_rows, put_rows
from taca_jax.parallel.processes import most_of_all
from taca_jax.telling.bars import shown
from taca_jax.text.encoders import TextEncoder
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.training.models import InputModels


class Encoders:
    """The autoencoder and the text encoder of a run, compiled on the mesh.

    Both take batches of `batch_size` samples; the autoencoder is compiled once for each size of
    pictures. Each process passes and receives the rows that its devices hold. If several processes
    hold the same row, `own` marks it in the one that writes it.
    """

    def __init__(self, models: InputModels, mesh: Mesh | None, batch_size: int, dtype: DTypeLike):
        autoencoder = models.autoencoder
        self.batch_size = batch_size
        self.rows = np.arange(batch_size) if mesh is None else local_rows(mesh, batch_size)
        own = self.rows if mesh is None else own_rows(mesh, batch_size)
        self.own = np.isin(self.rows, own)
        self.moments = isinstance(autoencoder, AutoencoderKL)
        self.downscale = autoencoder.config.downscale
        self.channels = autoencoder.config.latent_channels
        self.tokenizer: Tokenizer = models.tokenizer
        self._mesh = mesh
        self._autoencoder = nnx.state(autoencoder)
        self._text_encoder = nnx.state(models.text_encoder)
        dtype = jnp.dtype(dtype)
        # Models with parameters compute in `dtype`, even if they return float32.
        latents_dtype = dtype if jax.tree.leaves(self._autoencoder) else jnp.dtype(jnp.float32)
        self.latents_dtype: str = latents_dtype.name
        places = None if mesh is None else batch_sharding(mesh)
        self._latents = jax.jit(latents_program(autoencoder, latents_dtype), out_shardings=places)
        self._text = jax.jit(text_program(models.text_encoder, dtype), out_shardings=places)

    def start(self, images: np.ndarray, tokens: np.ndarray) -> "Encoding":
        """Starts encoding this process's rows of a batch, and any number of captions.

        images: uint8 [rows, H, W, 3]. tokens: int32 [n, t].
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


def latents_program(
    autoencoder: Autoencoder, dtype: DTypeLike
) -> Callable[[nnx.State, UInt8[Array, "b H W 3"]], tuple[Float[Array, "b h w c"], ...]]:
    """What encodes pictures, given the autoencoder's state: mean and log variance of the latents,
    or for one that has no variance the latents alone, in `dtype`."""
    graph = nnx.graphdef(autoencoder)

    def latents(state: nnx.State, images: jax.Array) -> tuple[jax.Array, ...]:
        model = nnx.merge(graph, state)
        images = images.astype(jnp.float32) / 127.5 - 1
        kl = isinstance(model, AutoencoderKL)
        found = model.moments(images) if kl else (model.encode(images),)
        return tuple(each.astype(dtype) for each in found)

    return latents


def text_program(
    text_encoder: TextEncoder, dtype: DTypeLike
) -> Callable[[nnx.State, Int[Array, "b t"]], tuple[Float[Array, "b n k"], Float[Array, "b p"]]]:
    """What encodes token ids, given the text encoder's state: embeddings in `dtype`, and pooled
    ones in float32."""
    graph = nnx.graphdef(text_encoder)

    def text(state: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = nnx.merge(graph, state)(tokens)
        return found.txt.astype(dtype), found.pooled.astype(jnp.float32)

    return text


@dataclass(frozen=True)
class Encoding:
    """A batch whose encoding has been started; its arrays are still on the devices."""

    latents: tuple[jax.Array, ...]
    texts: list[tuple[jax.Array, jax.Array]]
    count: int

    def get(self) -> tuple[list[np.ndarray], list[Caption]]:
        """Waits for this process's latents, arrays [rows, h, w, c], and caption embeddings."""
        latents = [_ours(array) for array in self.latents]
        captions = [
            Caption(txt=txt, pooled=pooled)
            for text in self.texts
            for txt, pooled in zip(*map(_ours, text), strict=True)
        ]
        return latents, captions[: self.count]


@dataclass(frozen=True)
class _Ready:
    """This process's rows of a batch before encoding; the example of an empty row is None."""

    images: np.ndarray
    indices: list[int]
    examples: list[Example | None]
    tokens: np.ndarray
    counts: list[int]
    """The number of captions of each row."""


def encode_to(
    writer: CacheWriter,
    source: Source,
    buckets: Sequence[Bucket],
    encoders: Encoders,
    *,
    done: np.ndarray,
    stopping: Callable[[], bool],
) -> bool:
    """Encodes and writes all examples of the buckets except those that are `done`.

    `stopping` is called after each batch; if it returns True, encoding ends early. Returns whether
    all examples have been encoded.
    """
    batches = _batches(buckets, done, encoders.batch_size)
    ready = _read_ahead(source, batches, encoders)
    before: tuple[_Ready, Encoding] | None = None
    writing: Future[None] | None = None
    left = len(batches)
    with ThreadPoolExecutor(1) as pool:
        for batch in shown(ready, "encoding batches", len(batches)):
            started = (batch, encoders.start(batch.images, batch.tokens))
            # The previous batch is fetched and written while this one is encoded.
            if writing is not None:
                writing.result()
            if before is not None:
                writing = pool.submit(_write, writer, encoders.own, *before)
            before = started
            left -= 1
            if stopping() and left:
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
    """Each bucket's indices in order, `size` at a time; its last batch may be shorter."""
    found = []
    for bucket in buckets:
        members = np.setdiff1d(np.concatenate(bucket.parts), done)
        parts = np.split(members, range(size, len(members), size)) if len(members) else []
        found += [(bucket, part) for part in parts]
    return found


def _read_ahead(
    source: Source, batches: Sequence[tuple[Bucket, np.ndarray]], encoders: Encoders
) -> Iterator[_Ready]:
    """This process's rows of the batches, read ahead by threads."""
    rows, lock = encoders.rows, threading.Lock()
    pieces = -(-len(rows) // FILES_PER_CHUNK)
    read = partial(_read, source, batches, encoders.tokenizer, lock)
    chunks = grain.MapDataset.range(len(batches) * pieces).map(
        lambda i: read(i // pieces, np.array_split(rows, pieces)[i % pieces])
    )
    threads = min(usable_cores(), MAX_THREADS)
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
    """Some rows of a batch; those past its end, and unreadable examples, are empty."""
    bucket, members = batches[number]
    indices = [int(members[row]) if row < len(members) else -1 for row in rows]
    examples: list[Example | None] = []
    for index in indices:
        try:
            examples.append(None if index < 0 else read_example(source, index, bucket.size))
        except BadExampleError:  # already counted and logged by the source
            examples.append(None)
    captions = [() if example is None else captions_of(example) for example in examples]
    texts = [text for each in captions for text in each]
    with lock:  # Rust tokenizers refuse two threads at a time
        tokens = np.asarray(tokenizer(texts or [""]), np.int32)[: len(texts)]
    assert bucket.size is not None  # the buckets of a cache have sizes
    images = np.zeros((len(rows), *bucket.size, 3), np.uint8)
    for image, example in zip(images, examples, strict=True):
        if example is not None:
            image[:] = example["image"]
    return _Ready(images, indices, examples, tokens, [len(each) for each in captions])


def _ours(array: jax.Array) -> np.ndarray:
    """The rows of an array that this process's devices hold, in order."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
