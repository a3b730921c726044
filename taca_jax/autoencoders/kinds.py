"""Union types of all autoencoders and of their configs."""

from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.autoencoders.tiny_vae import TinyVAE, TinyVAEConfig
from taca_jax.autoencoders.vae import AutoencoderKL, VAEConfig

Autoencoder = Pixels | TinyVAE | AutoencoderKL
AutoencoderConfig = PixelsConfig | TinyVAEConfig | VAEConfig
