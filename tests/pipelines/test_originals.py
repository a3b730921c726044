"""Pipelines of weights that nobody has converted are those of their conversion, bit for bit."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.autoencoders import vae_original as vae_bfl
from taca_jax.convert.cli import main
from taca_jax.errors import UserError
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.families.sd3 import stability as sd3_native
from taca_jax.families.sd3.pipeline import SD3Pipeline
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.text import encoders_by_folder as encoder_parts
from taca_jax.text import t5_layout as t5_format
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests.convert.test_sd3 import SD3, T5, VAE
from tests.models import in_layout
from tests.random_models import random_model
from tests.shared import shared_path


def assert_same_model(ours, theirs) -> None:
    assert ours.config == theirs.config
    expected = flat_params(theirs)
    assert flat_params(ours).keys() == expected.keys()
    for path, param in flat_params(ours).items():
        assert param.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(param.get_value(), expected[path].get_value(), err_msg=path)


def models_of(pipeline: Pipeline) -> dict:
    parts = {"transformer": pipeline.transformer, "autoencoder": pipeline.autoencoder}
    found = parts | encoder_parts(pipeline.text_encoder)
    return {name: model for name, model in found.items() if model is not None}


def assert_same_pipeline(ours: Pipeline, theirs: Pipeline) -> None:
    assert type(ours) is type(theirs)
    assert ours.settings == theirs.settings
    models, expected = models_of(ours), models_of(theirs)
    assert models.keys() == expected.keys()
    for name, model in models.items():
        assert_same_model(model, expected[name])


def drawn(pipeline: Pipeline) -> np.ndarray:
    config = pipeline.transformer.config
    keys = jax.random.split(jax.random.key(0), 3)
    return pipeline(
        prompt_embeds=jax.random.normal(keys[0], (1, 4, config.txt_dim)),
        pooled_prompt_embeds=jax.random.normal(keys[1], (1, config.pooled_dim)),
        latents=jax.random.normal(keys[2], (1, 8, 8, config.latent_channels)),
        steps=2,
        output="array",
    ).images


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_diffusers_folder_of_flux(tmp_path, dtype):
    src = shared_path("golden/flux")
    main(["flux", "--src", str(src), "--dst", str(tmp_path / "converted")])
    original = FluxPipeline.from_pretrained(src, dtype)
    converted = FluxPipeline.from_pretrained(tmp_path / "converted", dtype)
    assert_same_pipeline(original, converted)
    eighth = FluxPipeline.from_pretrained(src, dtype, quantize="int8")
    folder = tmp_path / "converted"
    assert_same_pipeline(eighth, FluxPipeline.from_pretrained(folder, dtype, quantize="int8"))
    if dtype == "float32":
        assert np.array_equal(drawn(original), drawn(converted))


@pytest.mark.slow
def test_a_diffusers_folder_of_stable_diffusion_3(tmp_path):
    src = shared_path("golden/sd3")
    main(["sd3", "--src", str(src), "--dst", str(tmp_path / "converted")])
    original, converted = (
        Pipeline.from_pretrained(path, "float32") for path in (src, tmp_path / "converted")
    )
    assert isinstance(original, SD3Pipeline)
    assert_same_pipeline(original, converted)


def test_black_forest_labs_file_and_the_autoencoder_beside_it(tmp_path, caplog):
    src = shared_path("golden/flux_bfl/flux1-dev.safetensors")
    original = Pipeline.from_pretrained(src, "bfloat16", mesh=make_mesh(MeshConfig()))
    assert f"what is not within is taken from beside it: {src.parent}/ae.safe" in caplog.text
    for name, file in (("transformer", src), ("autoencoder", src.with_name("ae.safetensors"))):
        main(["flux", "--src", str(file), "--dst", str(tmp_path / name)])
        converted = load_model(
            tmp_path / name, LoadOptions(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        )
        assert_same_model(models_of(original)[name], converted)
    assert (original.settings.steps, original.settings.text_length) == (28, 512)
    with pytest.raises(UserError, match="is an autoencoder alone; give the transformer's file"):
        Pipeline.from_pretrained(src.with_name("ae.safetensors"))
    with pytest.raises(UserError, match="is of kind flux; SD3Pipeline reads sd3"):
        SD3Pipeline.from_pretrained(src)


@pytest.mark.slow
def test_stability_ais_file_with_all_that_is_in_it(tmp_path):
    parts = {
        sd3_native.PREFIX: (sd3_native.table_of(SD3), SD3),
        "first_stage_model.": (vae_bfl.table_of(VAE), VAE),
        "text_encoders.t5xxl.transformer.": (t5_format.TABLE, T5),
    }
    tensors = {}
    for prefix, (table, config) in parts.items():
        exported = in_layout(table, random_model(config, param_dtype=jnp.float16))
        tensors |= {prefix + name: array for name, array in exported.items()}
    src = tmp_path / "sd3.safetensors"
    write_tensors(src, tensors)
    main(["sd3", "--src", str(src), "--dst", str(tmp_path / "converted")])
    original = SD3Pipeline.from_pretrained(src, "bfloat16")
    assert_same_pipeline(original, Pipeline.from_pretrained(tmp_path / "converted", "bfloat16"))
    assert original.autoencoder is not None
    assert original.text_encoder is None  # a T5 without its CLIPs reads no prompt


def test_stability_ais_own_file():
    src = shared_path("golden/sd35_native/sd3.5_medium.safetensors")
    pipeline = Pipeline.from_pretrained(src, "float32")
    assert pipeline.autoencoder is None
    tensors = open_tensors(src)
    table = sd3_native.table_of(pipeline.transformer.config)
    for name, array in in_layout(table, pipeline.transformer).items():
        np.testing.assert_array_equal(array, tensors.read(sd3_native.PREFIX + name), err_msg=name)


def test_what_is_damaged_or_of_nothing_known_is_said(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros(1, np.float32)})
    known = r"\(FLUX\.1, Stable Diffusion 3, FLUX\.2\)"
    with pytest.raises(UserError, match=f"holds no transformer that is known {known}: it has a;"):
        Pipeline.from_pretrained(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="nor is it an original, which is a diffusers folder with"):
        Pipeline.from_pretrained(tmp_path)
    shutil.copytree(shared_path("golden/flux"), tmp_path / "flux")
    shutil.rmtree(tmp_path / "flux" / "scheduler")
    (tmp_path / "flux" / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="vae"):
        Pipeline.from_pretrained(tmp_path / "flux")
