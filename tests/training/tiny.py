"""Models and runs that are small enough to train in a test."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from taca_jax.autoencoders.pixels import Pixels
from taca_jax.data.config import DataConfig
from taca_jax.families.flux.model import FluxConfig
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.nn.lora import LoRAConfig
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.text.encoders import T5Text
from taca_jax.text.t5 import T5Config
from taca_jax.text.tokenizers import load_tokenizer
from taca_jax.training.config import TrainConfig
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.weights.pipeline_folders import PipelineSettings
from tests.random_models import random_model

FLUX = FluxConfig(
    patch_size=4,
    latent_channels=3,
    num_heads=2,
    head_dim=16,
    axes_dim=(4, 6, 6),
    theta=10_000,
    num_double_blocks=1,
    num_single_blocks=1,
    mlp_ratio=2.0,
    txt_dim=32,
    pooled_dim=32,
    guidance_embed=False,
)
T5 = T5Config(vocab_size=33, dim=32, ff_dim=32, num_heads=2, head_dim=16, num_layers=1)
TEXT_LENGTH = 16


def tiny_config(out_dir: Path, **changes: Any) -> TrainConfig:
    """A base from scratch on 64 pictures of shapes, batches of 2."""
    values = {
        "name": "tiny",
        "steps": 4,
        "model": FLUX,
        "text": TextConfig(tokenizer="shapes", length=TEXT_LENGTH, encoder=T5),
        "data": DataConfig(source="generated:shapes/64", batch_size=2, resolution=40),
        "optimizer": OptimizerConfig(learning_rate=3e-3, ema_decay=0.9),
        "log_every": 1,
        "save_every": 2,
        "out_dir": str(out_dir),
    }
    return TrainConfig(**(values | changes))


def lora_changes(base: str) -> dict[str, Any]:
    """What makes of a `tiny_config` the training of a LoRA on this base, under TACA."""
    return {
        "base": base,
        "model": None,
        "text": TextConfig(),
        "lora": LoRAConfig(rank=2, alpha=4),
        "taca": TacaConfig(threshold=800),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
    }


def tiny_pipeline(config: FluxConfig = FLUX, *, seed: int = 0, steps: int = 3) -> FluxPipeline:
    """A pipeline on pixels with random weights."""
    return FluxPipeline(
        random_model(config, seed=seed),
        text_encoder=T5Text(random_model(T5, seed=seed), pad_id=0),
        tokenizer=load_tokenizer("shapes", TEXT_LENGTH),
        autoencoder=Pixels(),
        settings=PipelineSettings(
            tokenizer="shapes",
            text_length=TEXT_LENGTH,
            resolution=40,
            steps=steps,
            guidance=1.0,
            schedule=FlowSchedule(),
        ),
    )


def arrays(tree: Any) -> dict[str, jax.Array]:
    """Leaves by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.asarray(leaf) for path, leaf in flat}
