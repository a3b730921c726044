"""Training FLUX.2: what the preset trains, and a run from the command to a picture. (Its loss and
gradients are held against PyTorch's in tests/parity/test_flux2.py.)"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs.flux2_taca import CONFIG, GENERATE
from taca_jax.convert.cli import main as convert
from taca_jax.data.config import DataConfig
from taca_jax.families.flux2.lora import ATTENTION_TARGETS
from taca_jax.families.flux2.text import Flux2Text
from taca_jax.nn.layers import Fixed, LoRAParam
from taca_jax.nn.lora import add_lora
from taca_jax.pipelines.generate import generate
from taca_jax.training.models import TextToImage, open_models
from taca_jax.training.run import train
from taca_jax.training.step import Batch, make_trainer
from tests.families.flux2.tiny import FLUX2, QWEN3, VAE
from tests.random_models import random_model
from tests.shared import shared_path


def test_the_preset_trains_the_lora_alone():
    transformer = random_model(FLUX2)
    paths = add_lora(transformer, CONFIG.lora, ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    assert len(paths) == 2 * 4 + 2
    encoder = Flux2Text(random_model(QWEN3), pad_id=0)
    trainer, trained = make_trainer(CONFIG, TextToImage(transformer, encoder), random_model(VAE))
    factors = nnx.to_flat_state(trained)
    assert len(factors) == 2 * len(paths)
    assert all(isinstance(factor, LoRAParam) for _, factor in factors)
    frozen = nnx.to_flat_state(trainer.frozen.autoencoder)
    assert any(isinstance(param, Fixed) for _, param in frozen)  # the statistics of the latents
    batch = Batch(
        image=jnp.zeros((1, 2, 16, 16, 3), jnp.uint8),
        tokens=jnp.asarray(np.arange(16).reshape(1, 2, 8), jnp.int32),
    )
    state = trainer.begin(trained)
    after, metrics = jax.eval_shape(trainer.step, state, trainer.frozen, batch)
    assert metrics["loss"].shape == ()
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, after)
    assert all(jax.tree.leaves(same))


def test_the_preset_is_of_a_released_model():
    models = open_models(CONFIG, published=True)
    assert models.tokens == {"image": 4096, "text": 512}
    assert GENERATE.base == CONFIG.base


@pytest.mark.slow
@pytest.mark.parametrize("encode", ["online", "cache"])
def test_from_pictures_to_a_picture(tmp_path, encode):
    """Encoded while training or before, the loss is the same."""
    convert(["flux2", "--src", str(shared_path("golden/flux2")), "--dst", str(tmp_path / "base")])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"a red fox number {i}")
    config = replace(
        CONFIG,
        steps=1,
        base=str(tmp_path / "base"),
        data=DataConfig(source=f"folder:{pictures}", batch_size=2, resolution=32, encode=encode),
        dtype="float32",
        out_dir=str(tmp_path / "run"),
    )
    train(config)
    lora = config.run_dir / "lora.safetensors"
    convert(["lora", "--src", str(lora), "--dst", str(tmp_path / "kohya"), "--to", "kohya"])
    out = tmp_path / "out.png"
    generate(
        replace(
            GENERATE,
            base=config.base,
            lora=f"{lora}@taca",
            prompt="a red fox",
            height=32,
            width=48,
            steps=2,
            dtype="float32",
            out=str(out),
        )
    )
    with Image.open(out) as picture:
        assert picture.width > picture.height
