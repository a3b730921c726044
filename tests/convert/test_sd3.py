"""Stability AI's single files, with what else is in them."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.autoencoders import vae_original
from taca_jax.convert.cli import main
from taca_jax.families.sd3 import stability
from taca_jax.families.sd3.family import SD3_VAE
from taca_jax.families.sd3.pipeline import SD3Pipeline
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.text import clip_layout, t5_layout
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests import models as tiny
from tests.models import CLIP, SD3, in_layout
from tests.random_models import random_model

VAE = tiny.vae_of(SD3_VAE)
T5 = replace(tiny.T5, dim=SD3.txt_dim)


@pytest.fixture
def whole(tmp_path) -> Path:
    """A file with a transformer, an autoencoder, a T5, and something that is none of them."""
    parts = {
        stability.PREFIX: (stability.table_of(SD3), SD3),
        "first_stage_model.": (vae_original.table_of(VAE), VAE),
        "text_encoders.t5xxl.transformer.": (t5_layout.TABLE, T5),
    }
    tensors = {"model_ema.decay": np.zeros(1, np.float32)}
    for prefix, (table, config) in parts.items():
        exported = in_layout(table, random_model(config))
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
    exported = in_layout(clip_layout.TABLE, random_model(CLIP))
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
        f"under {stability.PREFIX}: {sd3}",
        "under first_stage_model.: an autoencoder in its original layout",
        f"under text_encoders.clip_g.transformer.: a CLIP text {encoder}",
        f"under text_encoders.clip_l.transformer.: a CLIP text {encoder}",
        f"under text_encoders.t5xxl.transformer.: a T5 v1.1 {encoder}",
        "1 other tensors: model_ema.decay",
    ]
    with pytest.raises(SystemExit, match="--num-heads and --activation to `taca-convert clip"):
        main(["sd3", "--src", str(file), "--dst", str(tmp_path / "made")])


def test_a_file_of_another_model_is_refused(whole, tmp_path, capsys):
    tensors = open_tensors(whole)
    t5 = tmp_path / "t5.safetensors"
    write_tensors(t5, {"encoder.x": tensors.read("model_ema.decay")})
    for words, message in (
        (["sd3", "--src", str(t5)], "is no Stable Diffusion 3 in Stability AI's names"),
        (["flux", "--src", str(whole)], "is no FLUX.1 in Black Forest Labs' names"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--dst", str(tmp_path / "made")])
        assert message in str(stop.value) + capsys.readouterr().err
    assert not (tmp_path / "made").exists()
