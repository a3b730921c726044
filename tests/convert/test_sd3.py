"""Stability AI's single files, with what else is in them, and LoRA files without a model."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.cli import main
from taca_jax.autoencoders import vae_original as vae_bfl
from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.families.sd3 import stability as sd3_native
from taca_jax.families.sd3.family import SD3_VAE
from taca_jax.families.sd3.lora import ATTENTION_TARGETS as SD3_ATTENTION_TARGETS
from taca_jax.families.sd3.model import SD3Config
from taca_jax.families.sd3.pipeline import SD3Pipeline
from taca_jax.formats import engine
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.text import clip_layout as clip
from taca_jax.text import t5_layout as t5_format
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.t5 import T5Config
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.lora_files import load_adapter, read_lora, write_lora
from tests.random_models import random_model, randomise

SD3 = SD3Config(
    patch_size=2,
    latent_channels=4,
    num_heads=2,
    head_dim=8,
    num_layers=4,
    num_dual_layers=2,
    qk_norm="rms",
    position_size=8,
    mlp_ratio=4.0,
    txt_dim=12,
    pooled_dim=10,
)
VAE = VAEConfig(
    channels=(32, 32),
    layers_per_block=1,
    latent_channels=4,
    groups=32,
    scaling_factor=SD3_VAE.scaling_factor,
    shift_factor=SD3_VAE.shift_factor,
)
T5 = T5Config(
    vocab_size=20,
    dim=12,
    ff_dim=16,
    num_heads=2,
    head_dim=4,
    num_layers=2,
    relative_buckets=32,
    relative_max_distance=128,
)
CLIP = CLIPConfig(11, 5, 8, 12, 2, 2, "gelu", 6, None)


@pytest.fixture
def whole(tmp_path) -> Path:
    """A file with a transformer, an autoencoder, a T5, and something that is none of them."""
    parts = {
        sd3_native.PREFIX: (sd3_native.table_of(SD3), SD3),
        "first_stage_model.": (vae_bfl.table_of(VAE), VAE),
        "text_encoders.t5xxl.transformer.": (t5_format.TABLE, T5),
    }
    tensors = {"model_ema.decay": np.zeros(1, np.float32)}
    for prefix, (table, config) in parts.items():
        exported = engine.export(table, random_model(config))
        tensors |= {prefix + name: array for name, array in exported.items()}
    file = tmp_path / "sd3.safetensors"
    write_tensors(file, tensors)
    return file


def test_all_models_of_a_file_become_a_pipeline(whole, tmp_path, capsys):
    main(["sd3", "--src", str(whole), "--dst", str(tmp_path / "made")])
    said = capsys.readouterr().out
    assert "left out: 1 other tensors: model_ema.decay" in said
    assert "to read prompts, copy tokenizer_3 of the model's page" in said
    for name, config in (("transformer", SD3), ("autoencoder", VAE), ("text_encoder_3", T5)):
        model = load_model(tmp_path / "made" / name, LoadOptions(dtype=jnp.float32))
        assert model.config == config
        for path, param in flat_params(random_model(config)).items():
            np.testing.assert_array_equal(
                param.get_value(), flat_params(model)[path].get_value(), err_msg=path
            )
    main(["verify", "--src", str(whole), "--dst", str(tmp_path / "made")])
    assert capsys.readouterr().out.count(" equal, 0 rounded") == 3
    pipeline = SD3Pipeline.from_pretrained(tmp_path / "made", "float32")
    assert pipeline.text_encoder is None  # without its CLIPs a T5 reads no prompt
    assert pipeline.settings.schedule.shift == 3.0
    assert (pipeline.settings.steps, pipeline.settings.guidance) == (40, 4.5)
    main(["inspect", str(whole)])
    assert "a Stable Diffusion 3 transformer in Stability AI's layout" in capsys.readouterr().out


def test_every_model_of_a_file_is_said(whole, tmp_path, capsys):
    """CLIPs of unusual sizes too, whose heads no shape tells."""
    stored = open_tensors(whole)
    tensors = {name: stored.read(name) for name in stored.shapes}
    exported = engine.export(clip.TABLE, random_model(CLIP))
    for which in "lg":
        prefix = f"text_encoders.clip_{which}.transformer."
        tensors |= {prefix + name: array for name, array in exported.items()}
    file = tmp_path / "all.safetensors"
    write_tensors(file, tensors)
    main(["inspect", str(file)])
    lines = capsys.readouterr().out.splitlines()
    said = [line.removeprefix(f"{file}: ") for line in lines if not line.startswith("  ")]
    sd3 = "a Stable Diffusion 3 transformer in Stability AI's layout"
    encoder = "encoder in transformers' layout"
    assert said == [
        f"under {sd3_native.PREFIX}: {sd3}",
        "under first_stage_model.: an autoencoder in its original layout",
        f"under text_encoders.clip_l.transformer.: a CLIP text {encoder}",
        f"under text_encoders.clip_g.transformer.: a CLIP text {encoder}",
        f"under text_encoders.t5xxl.transformer.: a T5 v1.1 {encoder}",
        "1 other tensors: model_ema.decay",
    ]
    with pytest.raises(SystemExit, match="--num-heads and --activation to `python -m convert clip"):
        main(["sd3", "--src", str(file), "--dst", str(tmp_path / "made")])


def test_a_file_of_another_model_is_refused(whole, tmp_path, capsys):
    tensors = open_tensors(whole)
    write_tensors(tmp_path / "t5.safetensors", {"encoder.x": tensors.read("model_ema.decay")})
    for words, message in (
        (["sd3", "--src", str(tmp_path / "t5.safetensors")], "is no Stable Diffusion 3"),
        (["flux", "--src", str(whole)], "is no FLUX in Black Forest Labs' names"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--dst", str(tmp_path / "made")])
        assert message in str(stop.value) + capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_loras_are_renamed_without_a_model(tmp_path, capsys):
    model = random_model(SD3)
    targets = (*SD3_ATTENTION_TARGETS, r"dual_blocks\.img_attn\.qkv\.[qkv]")
    add_lora(
        model, LoRAConfig(rank=2, alpha=3.0, targets=targets), ATTENTION_TARGETS, rngs=nnx.Rngs(0)
    )
    randomise(model, LoRAParam, scale=0.2)
    first, kohya, again = (tmp_path / f"{name}.safetensors" for name in ("a", "kohya", "b"))
    write_lora(first, model)
    main(["lora", "--src", str(first), "--dst", str(kohya), "--to", "kohya"])
    assert any(name.startswith("lora_unet_joint_blocks_3_") for name in open_tensors(kohya).shapes)
    main(["lora", "--src", str(kohya), "--dst", str(again), "--to", "peft"])
    assert load_adapter(again).kind == "sd3"
    expected = {place: factors.a @ factors.b for place, factors in load(first, model).items()}
    for file in (kohya, again):
        given = load(file, model)
        assert given.keys() == expected.keys()
        for place, factors in given.items():
            delta = factors.strength * factors.a @ factors.b
            np.testing.assert_allclose(delta, expected[place], atol=1e-5)
        assert "LoRA of" in str(read_lora(file, model))
    with pytest.raises(SystemExit, match=r"tells which layers .*; give --model"):
        main(["lora", "--src", str(first), "--dst", str(tmp_path / "n"), "--to", "native"])
    ours = tmp_path / "ours.safetensors"
    write_lora(ours, model, "native")
    assert load_adapter(ours).kind == "sd3"
    for layout in ("peft", "kohya"):
        with pytest.raises(SystemExit, match=r"tells which layers .*; give --model"):
            main(["lora", "--src", str(ours), "--dst", str(tmp_path / "n"), "--to", layout])


def load(file, model):
    return load_adapter(file, "sd3", model.config).adapter
