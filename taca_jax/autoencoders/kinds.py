"""The autoencoders that there are, as types."""

from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.autoencoders.tiny_vae import TinyVAE, TinyVAEConfig
from taca_jax.autoencoders.vae import AutoencoderKL, VAEConfig

Autoencoder = Pixels | TinyVAE | AutoencoderKL
AutoencoderConfig = PixelsConfig | TinyVAEConfig | VAEConfig
