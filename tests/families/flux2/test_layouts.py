"""FLUX.2 in others' layouts: sizes from settings and shapes, single files of all its models."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from taca_jax.autoencoders import patched_vae_layout
from taca_jax.autoencoders.patched_vae import PatchedVAEConfig
from taca_jax.convert.cli import main
from taca_jax.errors import UserError
from taca_jax.families.flux import bfl as flux_bfl
from taca_jax.families.flux2 import bfl, diffusers
from taca_jax.families.flux2.model import FLUX2_DEV, KLEIN_4B, KLEIN_BASE_4B, KLEIN_BASE_9B
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text import qwen3_layout
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import open_pipeline
from tests.families.flux2.tiny import FLUX2, QWEN3, VAE
from tests.models import in_layout, layout_shapes, shapes_alone
from tests.random_models import random_model


def test_settings_both_ways():
    for config in (FLUX2, KLEIN_BASE_4B, FLUX2_DEV):
        again = diffusers.config_of(Settings(Path("x"), diffusers.settings_of(config)))
        assert again == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name 'FluxTransformer2DModel'; only"),
        ({"out_channels": 64}, "out_channels 64; only 128 is supported"),
        ({"axes_dims_rope": [2, 2, 2]}, "axes_dim"),
        ({"eps": 1e-5}, "eps 1e-05; only 1e-06"),
        ({"num_layers": "two"}, "num_double_blocks"),
    ],
)
def test_settings_that_are_not_ours(change, words):
    with pytest.raises(UserError, match=words):
        diffusers.config_of(
            Settings(Path("x/config.json"), {**diffusers.settings_of(FLUX2), **change})
        )


@pytest.mark.parametrize("distilled", [True, False, None])
def test_the_pipeline_says_whether_a_model_is_distilled(tmp_path, distilled):
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(diffusers.settings_of(FLUX2)))
    write_tensors(
        folder / "diffusion_pytorch_model.safetensors",
        in_layout(diffusers.TABLE, random_model(FLUX2)),
    )
    if distilled is not None:
        index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    stored = open_pipeline(tmp_path)
    assert stored.transformer.config.distilled == bool(distilled)
    expected = (4, 1.0) if distilled else (50, 4.0)
    assert (stored.settings.steps, stored.settings.guidance) == expected


def test_pipelines_that_edit_with_reference_images_are_refused(tmp_path):
    index = {"_class_name": "Flux2KleinKVPipeline", "is_distilled": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    where = tmp_path / "transformer" / "config.json"
    with pytest.raises(UserError, match=r"Flux2KleinKVPipeline'; only 'Flux2KleinPipeline' or"):
        diffusers.config_of(Settings(where, diffusers.settings_of(FLUX2)))


def test_schedule():
    assert FlowSchedule(mu="empirical") == diffusers.SCHEDULE
    fields = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": False,
        "shift": 3.0,
    }
    with pytest.raises(UserError, match=r"shifts by a constant; FLUX\.2 by the size"):
        diffusers.schedule_of(Settings(Path("x"), fields))


def test_sizes_of_black_forest_labs_files():
    for config in (KLEIN_BASE_4B, KLEIN_BASE_9B, FLUX2_DEV):
        tensors = shapes_alone(layout_shapes(bfl.TABLE, config))
        assert bfl.is_flux2(tensors)
        assert not flux_bfl.is_flux(tensors)
        assert bfl.inferred(tensors) == config
    tensors = shapes_alone(layout_shapes(bfl.TABLE, KLEIN_BASE_4B))
    assert bfl.inferred(tensors, distilled=True) == KLEIN_4B
    assert bfl.inferred(shapes_alone(layout_shapes(bfl.TABLE, FLUX2)), FLUX2.axes_dim) == FLUX2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "heads of 8 channels, .* give axes_dim, four even numbers that sum to 8"),
        ({"img_in.weight": (16, 20)}, "takes 20 channels and gives 128; expected the same"),
        ({"img_in.weight": (20, 128)}, "20 channels in heads of 8"),
    ],
)
def test_sizes_that_shapes_do_not_tell(change, words):
    with pytest.raises(UserError, match=words):
        bfl.inferred(shapes_alone(layout_shapes(bfl.TABLE, FLUX2) | change))


def as_stored(tensors):
    return dict(tensors)


def in_float8(tensors):
    """Kernels in float8 times a number each, as the authors' and ComfyUI's fp8 files."""
    made = {}
    for name, array in tensors.items():
        if array.ndim != 2:
            made[name] = array
            continue
        scale = np.abs(array).max() / 448
        made[name] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
        made[f"{name}_scale"] = np.float32(scale)
        made[name.replace(".weight", ".input_scale")] = np.float32(1)
    return made


@pytest.mark.parametrize(
    ("change", "autoencoder"),
    [(as_stored, "vae/flux2-vae.safetensors"), (in_float8, "ae.safetensors")],
)
def test_single_files_in_a_folder(tmp_path, change, autoencoder, capsys):
    """The transformer of the authors, Qwen3 and the autoencoder as ComfyUI has them, or the latter
    by the authors' name; both ways."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    whole = replace(QWEN3, num_layers=29)
    tables = {
        "diffusion_models/flux-2-klein.safetensors": (bfl.TABLE, FLUX2, change),
        "text_encoders/qwen_3.safetensors": (qwen3_layout.table_of(whole), whole, change),
        autoencoder: (patched_vae_layout.original_table_of(VAE), VAE, dict),
    }
    models = {}
    for name, (table, config, changed) in tables.items():
        models[name] = random_model(config)
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        tensors = changed(in_layout(table, models[name]))
        if config is VAE:
            tensors["bn.num_batches_tracked"] = np.zeros((), np.int64)
        if config is whole:
            tensors |= {"model.norm.weight": np.ones(whole.dim, np.float32)}
        write_tensors(src / name, tensors)
    main(["flux2", "--src", str(src), "--dst", str(dst), "--axes-dim", "2,2,2,2"])
    assert "copy tokenizer of the model's page" in capsys.readouterr().out
    exact = 0 if change is as_stored else 0.08
    names = ("transformer", "text_encoder", "autoencoder")
    configs = (FLUX2, QWEN3, VAE)
    for part, config, model in zip(names, configs, models.values(), strict=True):
        made = load_model(dst / part, LoadOptions(dtype=jnp.float32, param_dtype=jnp.float32))
        assert made.config == config
        for path, param in flat_params(made).items():
            expected = flat_params(model)[path].get_value()[: len(param.get_value())]
            np.testing.assert_allclose(
                param.get_value(), expected, rtol=exact, atol=exact / 10, err_msg=path
            )
    if change is as_stored:
        main(["verify", "--src", str(src), "--dst", str(dst)])
        assert capsys.readouterr().out.count(" equal, 0 rounded") == 3
        for part, name in (("transformer", 0), ("autoencoder", 2)):
            file = tmp_path / f"{part}.safetensors"
            words = ["export", "--src", str(dst / part), "--dst", str(file), "--to", "original"]
            main(words)
            table, config, _ = list(tables.values())[name]
            ours = in_layout(table, random_model(config))
            stored = open_tensors(file)
            assert stored.shapes == {key: array.shape for key, array in ours.items()}
            for key, array in ours.items():
                np.testing.assert_array_equal(array, stored.read(key), key)


def test_the_autoencoder_in_diffusers_layout(tmp_path):
    settings = Settings(Path("x"), patched_vae_layout.settings_of(VAE))
    assert patched_vae_layout.config_of(settings) == VAE
    oblong = Settings(Path("x"), {**settings.fields, "patch_size": [2, 1]})
    with pytest.raises(UserError, match=r"patch_size \[2, 1\]; expected a square"):
        patched_vae_layout.config_of(oblong)


def test_autoencoders_that_make_no_sense():
    sizes = {"channels": (4, 8), "layers_per_block": 1, "groups": 2}
    with pytest.raises(UserError, match="6 channels; expected a multiple of 2 x 2"):
        PatchedVAEConfig(**sizes, latent_channels=6)
    with pytest.raises(UserError, match="expected 1 and 0"):
        PatchedVAEConfig(**sizes, latent_channels=8, scaling_factor=2.0)
