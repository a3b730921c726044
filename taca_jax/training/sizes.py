"""Checks that the models of a run and its pictures fit together."""

from typing import Any

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.errors import UserError
from taca_jax.nn.kinds import kind_of
from taca_jax.training.config import TrainConfig
from taca_jax.weights.pipeline_folders import StoredModel


def check_sizes(config: TrainConfig, transformer: Any, autoencoder: StoredModel) -> None:
    """Raises UserError unless transformer, autoencoder and pictures fit together."""
    latents = autoencoder.config
    if kind_of(latents).role != "autoencoder":
        kind = kind_of(latents)
        raise UserError(
            f"autoencoder={config.autoencoder} holds a {kind.module.__name__}; give the folder of "
            "an autoencoder"
        )
    given, expected = latents.latent_channels, transformer.latent_channels
    if given != expected:
        raise UserError(
            f"the autoencoder has {given} latent channels, the transformer expects {expected}; "
            "give the autoencoder=FOLDER that belongs to it"
        )
    if config.data.latents == "sample" and not isinstance(latents, VAEConfig):
        name = kind_of(latents).module.__name__
        raise UserError(
            f"data.latents is sample; this autoencoder ({name}) makes one latent of a picture: set "
            "data.latents=mean"
        )
    resolution = config.data.resolution
    multiple = latents.downscale * transformer.patch_size
    if resolution % multiple:
        raise UserError(
            f"data.resolution is {resolution}; this model takes multiples of {multiple} pixels"
        )
