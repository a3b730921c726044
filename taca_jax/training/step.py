"""One optimizer step: the flow-matching objective under TACA, its gradient, the update."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from taca_jax.autoencoders.kinds import Autoencoder, AutoencoderConfig
from taca_jax.autoencoders.vae import AutoencoderKL, VAEConfig, to_latents
from taca_jax.families.registry import family_of
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.fusion import step_options
from taca_jax.nn.layers import LoRAParam
from taca_jax.taca import active, gamma_at
from taca_jax.training.config import TrainConfig
from taca_jax.training.features import readout_loss
from taca_jax.training.losses import flow_matching_loss, interpolate, sample_timesteps
from taca_jax.training.models import TextToImage
from taca_jax.training.shardings import sharding_tables, state_shardings

_LATENTS = 2**31 - 1
"""Folded into a step's key for sampling latents, so that times and noise stay the same."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Pictures and captions, leading axis grad_accumulation.

    labels: what the patches of the pictures show (`label_patches`), with config.features.
    """

    image: UInt8[Array, "a b R R 3"]
    tokens: Int[Array, "a b t"]
    labels: UInt8[Array, "a b rows columns 3"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncodedBatch:
    """Encoded pictures and captions, leading axis grad_accumulation.

    mean: an AutoencoderKL's unscaled `moments`; of other autoencoders the latents. logvar: present
    if latents are to be sampled.
    """

    mean: Float[Array, "a b h w z"]
    txt: Float[Array, "a b t k"]
    pooled: Float[Array, "a b p"]
    logvar: Float[Array, "a b h w z"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the random key of the run.

    rng: the key's data, uint32, as checkpoints store it; a step folds its number in. trained: the
    trained parameters only. average: their moving average, or None without ema_decay.
    """

    step: Int[Array, ""]
    rng: jax.Array
    trained: nnx.State
    optimizer: optax.OptState
    average: nnx.State | None

    @property
    def best(self) -> nnx.State:
        """The parameters to sample, score and export."""
        return self.trained if self.average is None else self.average


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen:
    """What a step uses and does not change.

    model: parameters that are not trained. autoencoder: its parameters; empty if batches come
    encoded. Their graph definitions and the autoencoder's config are static.
    """

    model: nnx.State
    autoencoder: nnx.State
    graph: nnx.GraphDef = field(metadata={"static": True})
    autoencoder_graph: nnx.GraphDef | None = field(metadata={"static": True})
    autoencoder_config: AutoencoderConfig = field(metadata={"static": True})

    def merge(self, trained: nnx.State) -> TextToImage:
        """The whole model with these trained parameters."""
        return nnx.merge(self.graph, trained, self.model)


def split_model(
    config: TrainConfig, model: TextToImage, autoencoder: Autoencoder | AutoencoderConfig
) -> tuple[nnx.State, Frozen]:
    """Splits the parameters that a run trains from all others: all of the model's, without its text
    encoder's if config.teaches_text; or with config.adapts those of the LoRA and of gamma.

    If batches come encoded, the autoencoder's config is enough.
    """
    kind: Any = LoRAParam if config.adapts else nnx.Param
    if config.teaches_text:
        kind = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("text_encoder")))
    graph, trained, frozen = nnx.split(model, kind, ...)
    if isinstance(autoencoder, AutoencoderConfig):
        return trained, Frozen(frozen, nnx.State({}), graph, None, autoencoder)
    ae_graph, ae_state = nnx.split(autoencoder)
    return trained, Frozen(frozen, ae_state, graph, ae_graph, autoencoder.config)


def first_state(config: TrainConfig, trained: nnx.State) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.key_data(jax.random.key(config.seed)),
        trained=trained,
        optimizer=config.optimizer.make(config.steps).init(trained),
        average=jax.tree.map(jnp.copy, trained) if config.optimizer.ema_decay else None,
    )


def train_step(
    config: TrainConfig, state: TrainState, frozen: Frozen, batch: Batch | EncodedBatch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; the parts of the batch (its leading axis) run one after another.

    The random key is the state's with the step's number folded in. Returns the next state and
    scalar metrics: loss, gradient_norm, learning_rate, and those of `batch_loss`.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    (value, terms), gradient = _mean_gradient(config, state.trained, frozen, batch, rng)
    optimizer = config.optimizer.make(config.steps)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
    trained = jax.tree.map(jnp.add, state.trained, updates)
    metrics = {
        "loss": value,
        **terms,
        "gradient_norm": optax.tree.norm(gradient),
        "learning_rate": config.optimizer.learning_rate_at(state.step, config.steps),
    }
    average = _moving_average(config, state, trained)
    return TrainState(state.step + 1, state.rng, trained, optimizer_state, average), metrics


def _mean_gradient(
    config: TrainConfig,
    trained: nnx.State,
    frozen: Frozen,
    batch: Batch | EncodedBatch,
    rng: jax.Array,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], nnx.State]:
    """What `batch_loss` returns, and the gradient, averaged over the parts of the batch."""
    parts = len(jax.tree.leaves(batch)[0])
    gradient = jax.value_and_grad(partial(batch_loss, config), has_aux=True)
    first = jax.tree.map(lambda x: x[0], batch)
    if parts == 1:
        return gradient(trained, frozen, first, rng)

    def accumulate(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        value = gradient(trained, frozen, *part)
        return jax.tree.map(lambda t, v: t + v / parts, total, value), None

    shapes = jax.eval_shape(gradient, trained, frozen, first, rng)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zero, (batch, jax.random.split(rng, parts)))
    return total


def _moving_average(config: TrainConfig, state: TrainState, trained: nnx.State) -> nnx.State | None:
    if state.average is None:
        return None
    # A shorter horizon at first, so that the average soon forgets the initial parameters.
    keep = jnp.minimum(config.optimizer.ema_decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, state.average, trained)


def batch_loss(
    config: TrainConfig,
    trained: nnx.State,
    frozen: Frozen,
    batch: Batch | EncodedBatch,
    rng: jax.Array,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The `objective` on one part of a batch, without its leading axis."""
    model = frozen.merge(trained)
    sampled = config.data.latents == "sample"
    latents_rng = jax.random.fold_in(rng, _LATENTS) if sampled else None
    x0, text = encoded_batch(model, frozen, batch, latents_rng)
    labels = batch.labels if isinstance(batch, Batch) else None
    return objective(config, model, x0, text, rng, labels)


def encoded_batch(
    model: TextToImage,
    frozen: Frozen,
    batch: Batch | EncodedBatch,
    latents_rng: jax.Array | None = None,
) -> tuple[Float[Array, "b h w c"], Conditioning]:
    """Latents, float32, and text embeddings of one part of a batch, without its leading axis.

    latents_rng: samples from the autoencoder's distributions; without it they are its means.
    """
    if isinstance(batch, EncodedBatch):
        x0 = _stored_latents(frozen.autoencoder_config, batch, latents_rng)
        return x0, Conditioning(txt=batch.txt.astype(jnp.float32), pooled=batch.pooled)
    if model.text_encoder is None or frozen.autoencoder_graph is None:
        raise ValueError("pictures and captions need an autoencoder and a text encoder")
    images = batch.image.astype(jnp.float32) / 127.5 - 1
    autoencoder = nnx.merge(frozen.autoencoder_graph, frozen.autoencoder)
    if latents_rng is not None and isinstance(autoencoder, AutoencoderKL):
        x0 = autoencoder.encode(images, latents_rng)
    else:
        x0 = autoencoder.encode(images)
    return x0.astype(jnp.float32), model.text_encoder(batch.tokens)


def objective(
    config: TrainConfig,
    model: TextToImage,
    x0: Float[Array, "b h w c"],
    text: Conditioning,
    rng: jax.Array,
    labels: UInt8[Array, "b rows columns 3"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The flow-matching loss on x0 at random times and, with config.features, that of the read-out.

    With config.taca, times are drawn above its threshold, the attention has TACA's gamma, and LoRA
    factors are on; without it, times are drawn over all of (0, 1000] and attention is plain.
    Source: equations 11-13 of arXiv 2506.07986. Beside the loss, metrics by name: if there are two
    losses, each of them, and of a gamma that is learnt its mean over the samples.
    """
    taca, transformer = config.taca, model.transformer
    family = family_of(transformer.config)
    time_rng, noise_rng = jax.random.split(rng)
    timestep = sample_timesteps(
        time_rng,
        len(x0),
        sampling=config.timestep_sampling,
        shift=config.timestep_shift,
        above=0.0 if taca is None else taca.threshold,
    )
    noise = jax.random.normal(noise_rng, x0.shape)
    inputs, options = call_at(config, model, x0, text, timestep, noise)
    gamma = options["gamma"]
    if config.features is None:
        terms = {} if model.gamma is None or gamma is None else {"gamma": gamma.mean()}
        return flow_matching_loss(transformer(*inputs, **options), x0, noise), terms
    if family.with_features is None or model.readout is None or labels is None:
        raise ValueError("supervised features need a family with them, a read-out and labels")
    velocity, tokens = family.with_features(
        transformer, *inputs, blocks=config.features.blocks, **options
    )
    terms = {
        "velocity_loss": flow_matching_loss(velocity, x0, noise),
        "features_loss": readout_loss(model.readout(tokens), labels, config.features.object_weight),
    }
    return terms["velocity_loss"] + config.features.weight * terms["features_loss"], terms


def call_at(
    config: TrainConfig,
    model: TextToImage,
    x0: Float[Array, "b h w c"],
    text: Conditioning,
    timestep: Float[Array, " b"],
    noise: Float[Array, "b h w c"],
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """The arguments with which training calls the transformer at these times, by position and by
    name: under TACA if it is configured, with LoRA factors on while TACA is."""
    taca, transformer = config.taca, model.transformer
    inputs = interpolate(x0, noise, timestep), timestep, text.txt, text.pooled
    options: dict[str, Any] = {
        "gamma": None if taca is None else (model.gamma or partial(gamma_at, taca))(timestep),
        "lora_scale": jnp.ones(len(x0))
        if taca is None
        else active(taca, timestep) * jnp.float32(1),
    }
    if family_of(transformer.config).embeds_guidance(transformer.config):
        options["guidance"] = jnp.full(len(x0), config.guidance)
    return inputs, options


def _stored_latents(
    config: AutoencoderConfig, batch: EncodedBatch, rng: jax.Array | None
) -> Float[Array, "b h w z"]:
    mean = batch.mean.astype(jnp.float32)
    if not isinstance(config, VAEConfig):
        return mean
    logvar = None if batch.logvar is None else batch.logvar.astype(jnp.float32)
    return to_latents(config, mean, logvar, rng)


@dataclass(frozen=True)
class Trainer:
    """`train_step` compiled for one run, with the parameters that it does not change.

    shardings: of the state's arrays; None without a mesh.
    begin: trained parameters -> the first state.
    step: (state, frozen, batch) -> (state, metrics); the state's buffers are donated.
    """

    frozen: Frozen
    shardings: TrainState | None
    begin: Callable[[nnx.State], TrainState]
    step: Callable[
        [TrainState, Frozen, Batch | EncodedBatch], tuple[TrainState, dict[str, jax.Array]]
    ]

    def abstract_state(self, trained: nnx.State) -> TrainState:
        """The first state, of ShapeDtypeStructs with shardings; so may the parameters be."""
        shapes = jax.eval_shape(self.begin, trained)
        if self.shardings is None:
            return shapes
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self.shardings,
        )

    def run(
        self, state: TrainState, batch: Batch | EncodedBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step; metrics are scalars on the device, perhaps not computed yet."""
        return self.step(state, self.frozen, batch)

    def merge(self, trained: nnx.State) -> TextToImage:
        """The whole model with these trained parameters."""
        return self.frozen.merge(trained)


def make_trainer(
    config: TrainConfig,
    model: TextToImage,
    autoencoder: Autoencoder | AutoencoderConfig,
    mesh: Mesh | None = None,
) -> tuple[Trainer, nnx.State]:
    """The trainer of `model`, and the parameters that it trains.

    On a mesh, which must be the current one, the state is sharded by the models' tables. Parameters
    may be ShapeDtypeStructs, to compile only. If batches come encoded, the autoencoder's config is
    enough. Raises ValueError if another mesh is the current one.
    """
    if mesh is not None and jax.sharding.get_abstract_mesh() != mesh.abstract_mesh:
        raise ValueError("the mesh of a trainer must be the current one")
    trained, frozen = split_model(config, model, autoencoder)
    begin = partial(first_state, config)
    compiled = partial(
        jax.jit,
        partial(train_step, config),
        donate_argnums=0,
        compiler_options=step_options(),
    )
    if mesh is None:
        # Committed to a device, as a step's results are; else the second step would recompile.
        def begin_here(trained: nnx.State) -> TrainState:
            return jax.device_put(begin(trained), jax.devices()[0])

        return Trainer(frozen, None, begin_here, compiled()), trained
    shardings = state_shardings(
        jax.eval_shape(begin, trained), trained, sharding_tables(model), mesh
    )
    return Trainer(
        frozen,
        shardings,
        jax.jit(begin, out_shardings=shardings),
        compiled(out_shardings=(shardings, None)),
    ), trained
