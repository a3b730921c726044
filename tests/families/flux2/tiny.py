"""A small FLUX.2 with its text encoder and autoencoder."""

from taca_jax.autoencoders.patched_vae import PatchedVAEConfig
from taca_jax.families.flux2.model import Flux2Config
from taca_jax.text.qwen3 import READS, Qwen3Config

QWEN3 = Qwen3Config(
    vocab_size=260,
    dim=8,
    ff_dim=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    num_layers=READS[-1],
    reads=READS,
)
FLUX2 = Flux2Config(
    latent_channels=128,
    num_heads=2,
    head_dim=8,
    axes_dim=(2, 2, 2, 2),
    theta=2000.0,
    num_double_blocks=2,
    num_single_blocks=3,
    mlp_ratio=3.0,
    txt_dim=QWEN3.width,
    guidance_embed=False,
)
VAE = PatchedVAEConfig(channels=(32, 32), layers_per_block=1, latent_channels=128, groups=32)
"""As small as the groups of the original's norms allow."""
