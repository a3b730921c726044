"""From a configuration to the pipeline that is trained."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.autoencoders.vae import AutoencoderKL
from taca_jax.errors import UserError
from taca_jax.families.flux.model import FluxTransformer
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.families.sd3.model import SD3Transformer
from taca_jax.nn.lora import add_lora
from taca_jax.parallel.batches import samples_together
from taca_jax.parallel.rules import placement
from taca_jax.pipelines.loading import load_pipeline
from taca_jax.pipelines.pipeline import Autoencoder, Pipeline, PipelineSettings
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text.config import TextConfig
from taca_jax.text.t5 import T5Encoder
from taca_jax.text.tokenizers import load_tokenizer
from taca_jax.training.config import TrainConfig
from taca_jax.weights.folders import abstract_model, load_config, load_model
from taca_jax.weights.pipeline_folders import AUTOENCODER, ROLES, Role, open_parts
from taca_jax.weights.shipped import find_weights

DEFAULT_STEPS = 20


def build_pipeline(
    config: TrainConfig, mesh: Mesh | None = None, only: Collection[Role] = ROLES
) -> Pipeline:
    """The pipeline to train: the base with fresh LoRA factors, or a new one from random numbers.

    Trained parameters are float32, activations config.dtype; what is read lies on `mesh`. Of a base
    `only` some parts are read (a transformer that is not is one of shapes). Raises UserError where
    parts do not fit.
    """
    dtype = jnp.dtype(config.dtype)
    if config.base is not None:
        if config.text != TextConfig():
            raise UserError(f"base={config.base} says how text is read; leave out text.*")
        if config.pixels != PixelsConfig():
            raise UserError(f"base={config.base} says how pixels are read; leave out pixels.*")
        # A frozen base may rest in the activations' precision; what is trained may not.
        param_dtype = "float32" if config.lora is None else config.dtype
        pipeline = load_pipeline(
            config.base,
            config.dtype,
            param_dtype=param_dtype,
            mesh=mesh,
            remat=config.remat,
            quantize=config.quantize,
            quantize_text=config.quantize_text,
            only=only,
        )
    else:
        pipeline = _new_pipeline(config)
    if config.autoencoder != "pixels":
        if config.pixels != PixelsConfig():
            raise UserError(
                f"autoencoder={config.autoencoder} says what latents are; leave out pixels.*"
            )
        if "autoencoder" in only:
            pipeline.autoencoder = load_model(
                config.autoencoder, dtype=dtype, param_dtype=dtype, place=placement(mesh)
            )
    no_text = "text" in only and pipeline.text_encoder is None
    if no_text or ("autoencoder" in only and pipeline.autoencoder is None):
        raise UserError(
            f"training from base={config.base} needs its text encoders and an autoencoder "
            "(autoencoder=FOLDER)"
        )
    autoencoder = pipeline.autoencoder or abstract_model(autoencoder_config(config), dtype=dtype)
    check_sizes(config, pipeline.transformer, autoencoder, mesh)
    if config.lora is not None and "transformer" in only:
        add_lora(pipeline.transformer, config.lora, rngs=nnx.Rngs(config.seed))
    return pipeline


def autoencoder_config(config: TrainConfig) -> Any:
    """The config of the autoencoder that a base is trained with. Raises UserError where none is."""
    assert config.base is not None
    if config.autoencoder != "pixels":
        return load_config(config.autoencoder)
    own = open_parts(find_weights(config.base)).models.get(AUTOENCODER)
    if own is None:
        raise UserError(
            f"training from base={config.base} needs an autoencoder (autoencoder=FOLDER)"
        )
    return own.config


def _new_pipeline(config: TrainConfig) -> FluxPipeline:
    assert config.model is not None  # TrainConfig saw to both
    assert config.text.encoder is not None
    tokenizer = load_tokenizer(config.text.tokenizer, config.text.length)
    encoder = replace(config.text.encoder, vocab_size=tokenizer.vocab_size)
    if encoder.dim != config.model.txt_dim or encoder.dim != config.model.pooled_dim:
        raise UserError(
            f"text.encoder.dim is {encoder.dim}; model.txt_dim {config.model.txt_dim} and "
            f"model.pooled_dim {config.model.pooled_dim} must equal it"
        )
    types = {"param_dtype": jnp.float32, "dtype": jnp.dtype(config.dtype)}
    rngs = nnx.Rngs(config.seed)
    evaluate = config.evaluate
    return FluxPipeline(
        FluxTransformer(config.model, rngs=rngs, remat=config.remat, **types),
        text_encoder=T5Encoder(encoder, rngs=rngs, **types),
        tokenizer=tokenizer,
        autoencoder=Pixels(config.pixels),
        settings=PipelineSettings(
            tokenizer=config.text.tokenizer,
            text_length=config.text.length,
            resolution=config.data.resolution,
            steps=DEFAULT_STEPS if evaluate is None else evaluate.steps,
            guidance=1.0 if evaluate is None else evaluate.guidance,
            schedule=FlowSchedule(),
        ),
    )


def check_sizes(
    config: TrainConfig,
    transformer: FluxTransformer | SD3Transformer,
    autoencoder: Autoencoder,
    mesh: Mesh | None,
) -> None:
    """Raises UserError where the parts of what is trained, its pictures or the mesh do not fit."""
    heads, parts = transformer.config.num_heads, 1 if mesh is None else mesh.shape["tensor"]
    if heads % parts:
        raise UserError(
            f"mesh.tensor is {parts}; the transformer's {heads} heads do not divide over it"
        )
    if not isinstance(autoencoder, Autoencoder):
        raise UserError(
            f"autoencoder={config.autoencoder} holds a {type(autoencoder).__name__}; give the "
            "folder of an autoencoder"
        )
    given, expected = autoencoder.config.latent_channels, transformer.config.latent_channels
    if given != expected:
        raise UserError(
            f"the autoencoder has {given} latent channels, the transformer expects {expected}; "
            "give the autoencoder=FOLDER that belongs to it"
        )
    if config.data.latents == "sample" and not isinstance(autoencoder, AutoencoderKL):
        raise UserError(
            f"data.latents is sample; this autoencoder ({type(autoencoder).__name__}) makes one "
            "latent of a picture: set data.latents=mean"
        )
    resolution = config.data.resolution
    multiple = autoencoder.config.downscale * transformer.config.patch_size
    if resolution % multiple:
        raise UserError(
            f"data.resolution is {resolution}; this model takes multiples of {multiple} pixels"
        )


def check_batch(config: TrainConfig, mesh: Mesh | None) -> None:
    """Raises UserError unless every device gets as many samples as every other."""
    together = 1 if mesh is None else samples_together(mesh)
    if config.data.batch_size % together:
        raise UserError(
            f"data.batch_size is {config.data.batch_size}, which {together} groups of devices "
            f"(mesh.data x mesh.fsdp) share; give a multiple of {together}, or share tokens or "
            "heads as well (mesh.context, mesh.tensor)"
        )
