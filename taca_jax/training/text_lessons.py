"""Teaches a new text encoder what belongs together in captions of shapes, before any picture.

A model that learns its text encoder and its pictures at once can lower its loss by colours and
shapes alone, and does not find out for very long which colour is said of which shape. Large models
start from text encoders that know; this gives a small one the same start. Captions may name
compositions that no picture of the training shows, as the text that T5 was trained on does.
"""

from collections.abc import Iterator
from functools import partial
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.data.shapes.captions import CATEGORIES
from taca_jax.data.shapes.drawing import pick
from taca_jax.data.shapes.examples import random_description
from taca_jax.data.shapes.labels import NO_PHRASE, WORD_CLASSES, label_words
from taca_jax.parallel.mesh import on
from taca_jax.parallel.processes import print_once
from taca_jax.telling.bars import shown
from taca_jax.text.encoders import TextEncoder
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.training.features import Readout, label_loss
from taca_jax.training.models import InputModels, RunModels
from taca_jax.weights.folders import save_model
from taca_jax.weights.hub_files import model_files
from taca_jax.weights.pipeline_folders import stored_model
from taca_jax.weights.shipped import find_weights

TAUGHT = "text_encoder"
"""The folder of the taught text encoder, in that of the run; a run that goes on reads it again."""

CAPTIONS = 256
"""Captions of a step."""

LEARNING_RATE = 2e-3
"""Of AdamW."""


class _Lesson(nnx.Module):
    """A text encoder and the read-out of its words, which is thrown away."""

    def __init__(self, encoder: TextEncoder, width: int):
        self.encoder = encoder
        self.readout = Readout(width, WORD_CLASSES, rngs=nnx.Rngs(0))

    def loss(self, tokens: jax.Array, labels: jax.Array) -> Float[Array, ""]:
        weight = (labels[..., 0] != NO_PHRASE).astype(jnp.float32)
        return label_loss(self.readout(self.encoder(tokens).txt), labels, WORD_CLASSES, weight)


def teach_text(models: RunModels, inputs: InputModels) -> None:
    """Teaches the text encoder of `inputs`, in place, as config.features says.

    A run that goes on (config.resume) reads what it taught at its start. All processes call this.
    """
    config = models.config
    folder = config.run_dir / TAUGHT
    (encoder,) = inputs.text_encoder.encoders
    if config.resume and folder.exists():
        taught = stored_model(find_weights(folder, model_files)).load(models.text_options)
        nnx.update(encoder, nnx.state(taught))
        return
    assert config.features is not None
    loss = _teach(models, inputs, config.features.text_steps)
    print_once(f"text encoder taught: a loss of {loss:.3f} nats for the labels of a word")
    save_model(folder, encoder)


def _teach(models: RunModels, inputs: InputModels, steps: int) -> float:
    """Takes the steps, and returns the last one's loss."""
    lesson = _Lesson(inputs.text_encoder, models.transformer.txt_dim)
    graph, params = nnx.split(lesson)
    optimizer = optax.adamw(LEARNING_RATE)
    batches = _batches(inputs.tokenizer, models.config.seed)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: nnx.State, state: optax.OptState, tokens: jax.Array, labels: jax.Array
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        def loss(params: nnx.State) -> Float[Array, ""]:
            return nnx.merge(graph, params).loss(tokens, labels)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state, value

    with on(models.mesh):
        state = jax.jit(optimizer.init)(params)
        value = jnp.inf
        for _ in shown(range(steps), "teaching the text encoder", steps):
            params, state, value = step(params, state, *next(batches))
    nnx.update(lesson, params)
    return float(value)


def _batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids [CAPTIONS, t] and labels [CAPTIONS, t, 4] of random captions, without end."""
    random = Random(seed)
    while True:
        described = [
            random_description(pick(CATEGORIES, random), pick(("train", "test"), random), random)
            for _ in range(CAPTIONS)
        ]
        captions = [description.caption for description in described]
        yield tokenizer(captions), np.stack([label_words(each) for each in described])
