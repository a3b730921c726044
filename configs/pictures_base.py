"""A small FLUX, from scratch, on your own pictures in the latents of TAEF1.

python -m convert tiny_vae --src TAEF1_FOLDER --dst taef1
python train.py --config pictures_base data.source=folder:PICTURES autoencoder=taef1
"""

from taca_jax import DataConfig, OptimizerConfig, TextConfig, TrainConfig
from taca_jax.families.flux.model import FluxConfig
from taca_jax.text.t5 import T5Config

CONFIG = TrainConfig(
    name="pictures_base",
    steps=20_000,
    model=FluxConfig(
        patch_size=2,
        latent_channels=16,
        num_heads=4,
        head_dim=64,
        axes_dim=(16, 24, 24),
        theta=10_000,
        num_double_blocks=3,
        num_single_blocks=6,
        mlp_ratio=4.0,
        txt_dim=256,
        pooled_dim=256,
        guidance_embed=False,
    ),
    text=TextConfig(
        tokenizer="bytes",
        length=64,
        encoder=T5Config(
            vocab_size=259, dim=256, ff_dim=512, num_heads=4, head_dim=64, num_layers=4
        ),
    ),
    autoencoder="taef1",
    data=DataConfig(source="folder:pictures", batch_size=16, resolution=256),
    optimizer=OptimizerConfig(
        learning_rate=5e-4,
        warmup_steps=500,
        schedule="cosine",
        weight_decay=0.01,
        ema_decay=0.999,
    ),
    remat="full",
    save_every=1_000,
)
