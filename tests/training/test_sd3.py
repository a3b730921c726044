"""A training step of Stable Diffusion 3: what is trained, and what goes in. (Its loss and gradients
are held against PyTorch's in tests/parity/test_sd3.py.)"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.sd35_taca import CONFIG
from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.families.sd3.lora import ATTENTION_TARGETS
from taca_jax.families.sd3.model import SD3Config
from taca_jax.families.sd3.text import SD3Text
from taca_jax.nn.layers import Fixed, LoRAParam
from taca_jax.nn.lora import add_lora
from taca_jax.text.clip import CLIPConfig
from taca_jax.training.models import TextToImage
from taca_jax.training.step import Batch, make_trainer
from tests.random_models import random_model

TINY = SD3Config(
    patch_size=2,
    latent_channels=3,
    num_heads=2,
    head_dim=8,
    num_layers=3,
    num_dual_layers=1,
    qk_norm="rms",
    position_size=8,
    mlp_ratio=2.0,
    txt_dim=20,
    pooled_dim=16,
)
CLIP = CLIPConfig(
    vocab_size=30,
    max_tokens=6,
    dim=8,
    ff_dim=16,
    num_heads=2,
    num_layers=2,
    activation="gelu",
    projection_dim=8,
    end_token=None,
)


def test_the_preset_trains_the_lora_alone_on_both_clips_embeddings():
    transformer = random_model(TINY)
    paths = add_lora(transformer, CONFIG.lora, ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    assert len(paths) == 3 * 6 + 5
    encoder = SD3Text(random_model(CLIP), random_model(CLIP), None, width=20, t5_length=4)
    trainer, trained = make_trainer(
        CONFIG, TextToImage(transformer, encoder), Pixels(PixelsConfig())
    )
    factors = nnx.to_flat_state(trained)
    assert len(factors) == 2 * len(paths)
    assert all(isinstance(factor, LoRAParam) for _, factor in factors)
    assert any(isinstance(param, Fixed) for _, param in nnx.to_flat_state(trainer.frozen.model))
    batch = Batch(
        image=jnp.zeros((1, 2, 16, 16, 3), jnp.uint8),
        tokens=jnp.asarray(np.arange(24).reshape(1, 2, 12), jnp.int32),
    )
    state = trainer.begin(trained)
    after, metrics = jax.eval_shape(trainer.step, state, trainer.frozen, batch)
    assert metrics["loss"].shape == ()
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, after)
    assert all(jax.tree.leaves(same))
