"""The loss on held-out pictures, at noise and times that are always the same."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from taca_jax.data.cache.reader import Cache
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.mixing import read_example
from taca_jax.data.sources.source import captions_of
from taca_jax.errors import UserError
from taca_jax.parallel.batches import local_rows, put_rows
from taca_jax.parallel.processes import most_of_all
from taca_jax.taca import MAX_TIMESTEP
from taca_jax.training.config import TrainConfig
from taca_jax.training.inputs import AnyExamples
from taca_jax.training.models import InputModels, RunModels
from taca_jax.training.step import Batch, EncodedBatch, Frozen, Trainer, call_at, encoded_batch

LOSS = "validation_loss"
"""The metric's name."""

_NOISE_SEED = 0x4E4F4953
"""Not the run's, so that runs with other seeds are measured at the same noise."""


@dataclass(frozen=True)
class _Rows:
    """This process's rows of a batch: arrays by name, the pictures' indices, and 1 for each row
    that counts (0 for those that fill up the batch, and for bad pictures)."""

    arrays: dict[str, np.ndarray]
    index: np.ndarray
    counts: np.ndarray


class Validation:
    """Measures a model on some pictures, which it reads once and keeps.

    Each picture's noise is decided by its index, and every picture is measured at the same times:
    neither the batch size, nor the number of devices, nor the seed of the run changes the number,
    up to rounding. It has the first of a picture's captions, and the mean of its latents.
    """

    def __init__(self, models: RunModels, inputs: InputModels | Cache, examples: AnyExamples):
        """Raises UserError if none of the pictures can be read."""
        self._models = models
        self._batches = [
            _read(models, inputs, examples, bucket.size, members)
            for bucket in examples.buckets
            for members in _chunks(np.sort(np.concatenate(bucket.parts)), models)
        ]
        if not most_of_all(sum(int(rows.counts.sum()) for rows in self._batches)):
            raise UserError("none of the pictures for validation can be read; see validation.*")
        self._times = validation_times(models.config)
        self._measure = jax.jit(partial(summed_losses, models.config))

    def due(self, step: int) -> bool:
        """Whether a run is measured after this step: every so many, and after the last one."""
        config = self._models.config
        assert config.validation is not None
        return step % config.validation.every == 0 or step == config.steps

    def loss(self, trainer: Trainer, trained: nnx.State) -> float:
        """The mean loss over all pictures and times. All processes must call this together."""
        mesh = self._models.mesh
        total = count = 0.0
        for rows in self._batches:
            arrays = {name: put_rows(array, mesh) for name, array in rows.arrays.items()}
            batch = Batch(**arrays) if "image" in arrays else EncodedBatch(**arrays)
            losses, counted = self._measure(
                trained,
                trainer.frozen,
                batch,
                put_rows(rows.index, mesh),
                put_rows(rows.counts, mesh),
                self._times,
            )
            total += float(losses)
            count += float(counted)
        return total / (count * len(self._times))


def validation_times(config: TrainConfig) -> np.ndarray:
    """float32 [validation.timesteps]: the middles of equal parts of the times that are trained."""
    assert config.validation is not None
    count = config.validation.timesteps
    low = 0.0 if config.taca is None else config.taca.threshold
    return (low + (MAX_TIMESTEP - low) * (np.arange(count) + 0.5) / count).astype(np.float32)


def summed_losses(
    config: TrainConfig,
    trained: nnx.State,
    frozen: Frozen,
    batch: Batch | EncodedBatch,
    index: Int[Array, " b"],
    counts: Float[Array, " b"],
    times: Float[Array, " n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the flow-matching losses of all pictures that count, over all times; and how many
    pictures count."""
    model = frozen.merge(trained)
    x0, text = encoded_batch(model, frozen, batch)
    key = jax.random.key(_NOISE_SEED)
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), x0.shape[1:]))(index)

    def at(time: jax.Array) -> jax.Array:
        timestep = jnp.full(len(x0), time)
        inputs, options = call_at(config, model, x0, text, timestep, noise)
        error = model.transformer(*inputs, **options).astype(jnp.float32) - (noise - x0)
        return jnp.sum(jnp.mean(jnp.square(error), axis=(1, 2, 3)) * counts)

    return jnp.sum(jax.lax.map(at, times)), jnp.sum(counts)


def _chunks(members: np.ndarray, models: RunModels) -> list[np.ndarray]:
    size = models.config.data.batch_size
    return [members[start : start + size] for start in range(0, len(members), size)]


def _read(
    models: RunModels,
    inputs: InputModels | Cache,
    examples: AnyExamples,
    size: tuple[int, int] | None,
    members: np.ndarray,
) -> _Rows:
    """This process's rows of the batch of these examples, filled up with its last one."""
    count = models.config.data.batch_size
    ours = np.arange(count) if models.mesh is None else local_rows(models.mesh, count)
    index = members[np.minimum(ours, len(members) - 1)]
    found: list[dict[str, np.ndarray] | None] = []
    for i in index.tolist():
        try:
            found.append(_example(inputs, examples, size, i))
        except BadExampleError:  # the source has counted and logged it
            found.append(None)
    good = next((each for each in found if each is not None), None)
    if good is None:
        good = _nothing(models, inputs, size)
    arrays = {
        name: np.stack([(good if each is None else each)[name] for each in found]) for name in good
    }
    counts = np.array([each is not None for each in found]) & (ours < len(members))
    return _Rows(arrays, index.astype(np.int32), counts.astype(np.float32))


def _example(
    inputs: InputModels | Cache, examples: AnyExamples, size: tuple[int, int] | None, index: int
) -> dict[str, np.ndarray]:
    if isinstance(examples.source, Cache):
        cached = examples.source[index]
        text: Any = examples.source.caption(cached, 0)
        return {"mean": cached["latents"][0], **text}
    assert isinstance(inputs, InputModels)  # whose pictures are not encoded
    example = read_example(examples.source, index, size)
    tokens = np.asarray(inputs.tokenizer([captions_of(example)[0]]), np.int32)
    return {"image": example["image"], "tokens": tokens[0]}


def _nothing(
    models: RunModels, inputs: InputModels | Cache, size: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """In place of an example where this process has no good one in a batch."""
    side = models.config.data.resolution
    height, width = size or (side, side)
    if isinstance(inputs, Cache):
        made = inputs.manifest
        latents = (height // made.downscale, width // made.downscale, made.channels)
        text: Any = inputs.empty
        return {"mean": np.zeros(latents, jnp.dtype(made.latents_dtype)), **text}
    tokens = np.asarray(inputs.tokenizer([""]), np.int32)
    return {"image": np.zeros((height, width, 3), np.uint8), "tokens": tokens[0]}
