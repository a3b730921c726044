"""One optimizer step: the flow-matching objective under TACA, its gradient, the update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from taca_jax.autoencoders.pixels import PixelsConfig
from taca_jax.autoencoders.tiny_vae import TinyVAEConfig
from taca_jax.autoencoders.vae import AutoencoderKL, VAEConfig, to_latents
from taca_jax.families.flux.model import FluxTransformer
from taca_jax.families.sd3.model import SD3Transformer
from taca_jax.nn.conditioning import Conditioning
from taca_jax.nn.layers import LoRAParam
from taca_jax.parallel.rules import parameter_spec
from taca_jax.pipelines.pipeline import Autoencoder
from taca_jax.taca import active, gamma_at
from taca_jax.text.encoders import FluxText, SD3Text, encode
from taca_jax.text.t5 import T5Encoder
from taca_jax.training.config import TrainConfig
from taca_jax.training.losses import flow_matching_loss, interpolate, sample_timesteps
from taca_jax.weights.folders import kind_of

AutoencoderConfig = VAEConfig | TinyVAEConfig | PixelsConfig

_LATENTS = 2**31 - 1
"""Folded into a step's key: of latents that are sampled, apart from its times and noise."""


class TextToImage(nnx.Module):
    """What training may change: the transformer and, from scratch, the text encoder with it."""

    def __init__(
        self,
        transformer: FluxTransformer | SD3Transformer,
        text_encoder: T5Encoder | FluxText | SD3Text | None,
    ):
        """`text_encoder` is None where batches come encoded."""
        self.transformer = transformer
        self.text_encoder = text_encoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Pictures and captions, leading axis grad_accumulation."""

    image: UInt8[Array, "a b R R 3"]
    tokens: Int[Array, "a b t"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncodedBatch:
    """What the autoencoder and the text encoders made of them, leading axis grad_accumulation.

    mean: of an AutoencoderKL raw, as its `moments` are; of others their latents. logvar: where
    latents are to be sampled.
    """

    mean: Float[Array, "a b h w z"]
    txt: Float[Array, "a b t k"]
    pooled: Float[Array, "a b p"]
    logvar: Float[Array, "a b h w z"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the key that decides its noise with the step's number.

    rng: the key's data, uint32, as checkpoints store it. trained: the trained parameters, and
    nothing that is frozen. average: their moving average, or None where the configuration asks for
    none.
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


@dataclass(frozen=True)
class Trainer:
    """The jitted step and what it needs; frozen parameters stand beside the state.

    places: the sharding of each array of the state, or None without a mesh.
    begin: trained parameters -> the first state, which takes them over.
    step: (state, frozen, autoencoder, batch) -> (state, metrics); the state's buffers are reused.
    """

    graph: nnx.GraphDef
    frozen: nnx.State
    autoencoder: nnx.State
    places: TrainState | None
    begin: Callable[[nnx.State], TrainState]
    step: Callable[
        [TrainState, nnx.State, nnx.State, Batch | EncodedBatch], tuple[TrainState, dict[str, Any]]
    ]

    def abstract_state(self, trained: nnx.State) -> TrainState:
        """The first state as shapes, each with its place, of parameters that may be shapes too."""
        shapes = jax.eval_shape(self.begin, trained)
        if self.places is None:
            return shapes
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            self.places,
        )

    def run(
        self, state: TrainState, batch: Batch | EncodedBatch
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step; metrics are scalars still on the device."""
        return self.step(state, self.frozen, self.autoencoder, batch)

    def merge(self, parameters: nnx.State) -> TextToImage:
        """The whole model with these trained parameters."""
        return nnx.merge(self.graph, parameters, self.frozen)


def make_trainer(
    config: TrainConfig,
    model: TextToImage,
    autoencoder: Autoencoder | AutoencoderConfig,
    *,
    pad_id: int,
    mesh: Mesh | None = None,
) -> tuple[Trainer, nnx.State]:
    """The trainer of `model`, and the parameters that it trains.

    With config.lora only LoRA factors are trained. On a mesh, which must be set, the state lies as
    `sharding.TABLES` say. Parameters may be shapes alone, to compile without them. Where batches
    come encoded, the autoencoder's config is enough.
    """
    kind = nnx.Param if config.lora is None else LoRAParam
    graph, trained, frozen = nnx.split(model, kind, ...)
    if isinstance(autoencoder, AutoencoderConfig):
        ae_graph, ae_state, ae_config = None, nnx.State({}), autoencoder
    else:
        (ae_graph, ae_state), ae_config = nnx.split(autoencoder), autoencoder.config
    sampled = config.data.latents == "sample"
    optimizer = config.optimizer.make(config.steps)
    decay = config.optimizer.ema_decay

    def loss(
        trained: nnx.State,
        frozen: nnx.State,
        ae: nnx.State,
        batch: Batch | EncodedBatch,
        rng: jax.Array,
    ) -> Float[Array, ""]:
        model = nnx.merge(graph, trained, frozen)
        latents_rng = jax.random.fold_in(rng, _LATENTS) if sampled else None
        if isinstance(batch, EncodedBatch):
            x0 = _stored_latents(ae_config, batch, latents_rng)
            text = Conditioning(txt=batch.txt.astype(jnp.float32), pooled=batch.pooled)
            return encoded_objective(model.transformer, x0, text, rng, config=config)
        images = batch.image.astype(jnp.float32) / 127.5 - 1
        assert ae_graph is not None  # only encoded batches do without
        encoder = nnx.merge(ae_graph, ae)
        if latents_rng is None:
            x0 = encoder.encode(images).astype(jnp.float32)
        else:
            assert isinstance(encoder, AutoencoderKL)  # build.check_sizes saw to it
            x0 = encoder.encode(images, latents_rng).astype(jnp.float32)
        return objective(model, x0, batch.tokens, rng, config=config, pad_id=pad_id)

    def step(
        state: TrainState, frozen: nnx.State, ae: nnx.State, batch: Batch | EncodedBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        parts = len(jax.tree.leaves(batch)[0])

        def accumulate(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
            value = jax.value_and_grad(loss)(state.trained, frozen, ae, *part)
            return jax.tree.map(lambda t, v: t + v / parts, total, value), None

        if parts == 1:
            first = jax.tree.map(lambda x: x[0], batch)
            value, gradient = jax.value_and_grad(loss)(state.trained, frozen, ae, first, rng)
        else:
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
            keys = jax.random.split(rng, parts)
            (value, gradient), _ = jax.lax.scan(accumulate, zero, (batch, keys))

        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        trained = jax.tree.map(jnp.add, state.trained, updates)
        average = state.average
        if average is not None:
            # A short memory at first, so that the average does not drag the random start along.
            keep = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, trained)
        metrics = {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": config.optimizer.learning_rate_at(state.step, config.steps),
        }
        state = TrainState(state.step + 1, state.rng, trained, optimizer_state, average)
        return state, metrics

    def first(trained: nnx.State) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            rng=jax.random.key_data(jax.random.key(config.seed)),
            trained=trained,
            optimizer=optimizer.init(trained),
            average=jax.tree.map(jnp.copy, trained) if decay else None,
        )

    places = None
    if mesh is None:
        # Bound to a device as what a step returns is: else the second step would be compiled anew.
        def begin(trained: nnx.State) -> TrainState:
            return jax.device_put(first(trained), jax.devices()[0])

        compiled = jax.jit(step, donate_argnames="state")
    else:
        kinds = {"transformer": kind_of(model.transformer.config)}
        if isinstance(model.text_encoder, T5Encoder):  # only such a one is ever trained
            kinds["text_encoder"] = kind_of(model.text_encoder.config)
        places = state_shardings(jax.eval_shape(first, trained), kinds, mesh)
        begin = jax.jit(first, out_shardings=places)
        compiled = jax.jit(step, donate_argnames="state", out_shardings=(places, None))
    return Trainer(graph, frozen, ae_state, places, begin, compiled), trained


def state_shardings(state: TrainState, kinds: Mapping[str, str], mesh: Mesh) -> TrainState:
    """Where each array of a state lies: averages and moments as the parameters that they are of.

    kinds: the kind of each of the model's parts, by its name in TextToImage.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        part, *inside = [*dropwhile(lambda name: name not in kinds, names)] or [""]
        if not inside:  # steps and counts
            return NamedSharding(mesh, PartitionSpec())
        spec = parameter_spec(kinds[part], ".".join(inside), leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def objective(
    model: TextToImage,
    x0: Float[Array, "b h w c"],
    tokens: Int[Array, "b t"],
    rng: jax.Array,
    *,
    config: TrainConfig,
    pad_id: int,
) -> Float[Array, ""]:
    """The flow-matching loss on x0 and the text that the encoder makes of tokens."""
    assert model.text_encoder is not None  # only encoded batches do without
    text = encode(model.text_encoder, tokens, pad_id)
    return encoded_objective(model.transformer, x0, text, rng, config=config)


def encoded_objective(
    transformer: FluxTransformer | SD3Transformer,
    x0: Float[Array, "b h w c"],
    text: Conditioning,
    rng: jax.Array,
    *,
    config: TrainConfig,
) -> Float[Array, ""]:
    """The flow-matching loss on x0 at random times.

    With config.taca, times are drawn above its threshold, the attention has TACA's gamma, and LoRA
    factors are on; without it, times are drawn over all of (0, 1000] and attention is plain.
    Source: equations 11-13 of arXiv 2506.07986.
    """
    taca = config.taca
    time_rng, noise_rng = jax.random.split(rng)
    timestep = sample_timesteps(
        time_rng,
        len(x0),
        sampling=config.timestep_sampling,
        shift=config.timestep_shift,
        above=0.0 if taca is None else taca.threshold,
    )
    noise = jax.random.normal(noise_rng, x0.shape)
    options = {}
    if isinstance(transformer, FluxTransformer) and transformer.config.guidance_embed:
        options["guidance"] = jnp.full(len(x0), config.guidance)
    velocity = transformer(
        interpolate(x0, noise, timestep),
        timestep,
        text.txt,
        text.pooled,
        gamma=None if taca is None else gamma_at(taca, timestep),
        lora_scale=jnp.ones(len(x0)) if taca is None else active(taca, timestep) * jnp.float32(1),
        **options,
    )
    return flow_matching_loss(velocity, x0, noise)


def _stored_latents(
    config: AutoencoderConfig, batch: EncodedBatch, rng: jax.Array | None
) -> Float[Array, "b h w z"]:
    mean = batch.mean.astype(jnp.float32)
    if not isinstance(config, VAEConfig):
        return mean
    logvar = None if batch.logvar is None else batch.logvar.astype(jnp.float32)
    return to_latents(config, mean, logvar, rng)
