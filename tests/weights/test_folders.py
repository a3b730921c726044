"""Model folders: what is written comes back, and nothing else is taken for it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.autoencoders.tiny_vae import TinyVAEConfig
from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import FluxConfig, FluxTransformer
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.text.t5 import T5Config
from taca_jax.weights.folders import (
    StreamedArray,
    load_config,
    load_model,
    save_model,
    save_streamed,
)
from taca_jax.weights.loading import LoadOptions
from tests.random_models import random_model

FLUX = FluxConfig(2, 4, 2, 8, (2, 2, 4), 10_000, 2, 2, 2.0, 6, 4, guidance_embed=False)
MODELS = {
    "flux": lambda: random_model(FLUX),
    "t5": lambda: random_model(T5Config(11, 8, 12, 2, 4, 2)),
    "vae": lambda: random_model(VAEConfig((4, 8), 1, 4, 2, 0.5, 0.1)),
    "tiny_vae": lambda: random_model(TinyVAEConfig(4, 3, 8, (1, 1), (1, 1))),
    "pixels": lambda: Pixels(PixelsConfig(shift_factor=0.5, scaling_factor=4.0)),
}
FORMATS = ("orbax", "safetensors")


def equal(a: nnx.Module, b: nnx.Module) -> bool:
    ours, theirs = flat_params(a), flat_params(b)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and np.array_equal(ours[name].get_value(), theirs[name].get_value())
        for name in ours
    )


@pytest.fixture(scope="module")
def model() -> FluxTransformer:
    return MODELS["flux"]()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_comes_back(tmp_path, kind, format):
    model = MODELS[kind]()
    save_model(tmp_path / "m", model)
    again = load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32))
    assert type(again) is type(model)
    assert again.config == model.config
    assert equal(again, model)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["kind"] == kind
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_without_parameters_is_its_config_alone(tmp_path, format):
    save_model(tmp_path / "m", MODELS["tiny_vae"]())
    save_model(tmp_path / "m", MODELS["pixels"]())
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["config.json"]
    (tmp_path / "m" / "config.json").write_text('{"kind": "pixels", "scaling_factor": 0}')
    assert "pixels.scaling_factor is 0.0; it must be positive and finite" in message(tmp_path / "m")


@pytest.mark.parametrize("format", FORMATS)
def test_dtypes_of_file_parameters_and_activations_are_three_things(tmp_path, model, format):
    save_model(tmp_path / "m", model, dtype=jnp.bfloat16)
    stored = load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32))
    assert {p.dtype for p in flat_params(stored).values()} == {jnp.dtype(jnp.bfloat16)}
    wide = load_model(
        tmp_path / "m", LoadOptions(dtype=jnp.bfloat16, param_dtype=jnp.float32, remat="full")
    )
    assert {p.dtype for p in flat_params(wide).values()} == {jnp.dtype(jnp.float32)}
    assert wide.dtype == jnp.bfloat16
    assert wide.remat == "full"
    for name, param in flat_params(model).items():
        np.testing.assert_array_equal(
            flat_params(wide)[name].get_value(),
            param.get_value().astype(jnp.bfloat16).astype(jnp.float32),
        )


@pytest.mark.parametrize("format", FORMATS)
def test_parameters_land_where_their_shardings_say(tmp_path, model, format):
    save_model(tmp_path / "m", model)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    over_mesh = jax.NamedSharding(mesh, jax.P())
    one = SingleDeviceSharding(jax.devices()[0])

    def place(kind, path, shape):
        assert shape == flat_params(model)[path].shape
        return over_mesh if (kind, path) == ("flux", "img_in.kernel") else one

    again = load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32, place=place))
    assert again.img_in.kernel.get_value().sharding == over_mesh
    assert equal(again, model)


@pytest.mark.parametrize("format", FORMATS)
def test_lora_factors_stay_out(tmp_path, format):
    model = MODELS["flux"]()
    add_lora(model, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    save_model(tmp_path / "m", model)
    assert equal(load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32)), MODELS["flux"]())


def test_saving_again_replaces_a_model_folder_and_nothing_else(tmp_path, model):
    save_model(tmp_path / "m", MODELS["t5"]())
    save_model(tmp_path / "m", model)
    assert equal(load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32)), model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    with pytest.raises(UserError, match="exists and is no model folder"):
        save_model(tmp_path / "other", model)
    assert (tmp_path / "other" / "precious").read_text() == "x"


def message(folder) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder, LoadOptions(dtype=jnp.float32))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_config_is_no_model(tmp_path, model):
    assert "is no model folder" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "flux", ')
    assert "is not JSON" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "sdxl"}')
    assert "says kind 'sdxl'; expected one of flux, sd3, t5, " in message(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "python -m convert" in message(tmp_path)
    save_model(tmp_path / "m", model)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_heds": 2}))
    assert "unknown key num_heds; did you mean num_heads?" in message(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "m" / "params")
    assert "neither params/ nor model.safetensors" in message(tmp_path / "m")
    assert load_config(tmp_path / "m") == FLUX


def test_every_wrong_parameter_is_named_at_once(tmp_path, model):
    save_model(tmp_path / "m", model)
    file = tmp_path / "m" / "model.safetensors"
    tensors = open_tensors(file)
    arrays = {name: tensors.read(name) for name in tensors.shapes}
    arrays["extra"] = arrays.pop("img_in.kernel")
    arrays["txt_in.bias"] = np.zeros(3, np.float32)
    write_tensors(file, arrays)
    said = message(tmp_path / "m")
    assert "1 missing: img_in.kernel" in said
    assert "1 left over: extra" in said
    assert "txt_in.bias is (3,) instead of (16,)" in said


def test_a_config_of_another_size_names_a_few_of_many(tmp_path, model):
    save_model(tmp_path / "m", model)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_heads": 4}))
    said = message(tmp_path / "m")
    assert "double_blocks.img.mod.kernel is (2, 16, 96) instead of (2, 32, 192)" in said
    assert " more" in said
    assert len(said) < 1000


def test_truncated_safetensors(tmp_path, model):
    save_model(tmp_path / "m", model)
    file = tmp_path / "m" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    assert f"{file} is truncated or damaged" in message(tmp_path / "m")


def test_damaged_orbax(tmp_path, model, capfd):
    save_model(tmp_path / "m", model)
    (chunk,) = (tmp_path / "m" / "params" / "txt_in.kernel").glob("[0-9]*")
    capfd.readouterr()
    os.truncate(chunk, 8)
    assert "txt_in.kernel is incomplete or damaged (chunk 0.0 is 8 bytes" in message(tmp_path / "m")
    chunk.unlink()
    assert "chunk 0.0 is missing" in message(tmp_path / "m")
    (chunk.parent / ".zarray").write_text("{")
    assert "its .zarray" in message(tmp_path / "m")
    shutil.rmtree(chunk.parent)
    assert "1 missing: txt_in.kernel" in message(tmp_path / "m")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_keeps_the_old_folder(tmp_path, format):
    """A limit on the size of files refuses a write as a full disk does."""
    old = MODELS["tiny_vae"]()
    save_model(tmp_path / "m", old)
    large = random_model(T5Config(5000, 8, 12, 2, 4, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match="could not be written") as error:
            save_model(tmp_path / "m", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert equal(load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32)), old)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_kill_while_writing_leaves_nothing_that_loads(tmp_path):
    """The writer hangs between the two layers of its array, and is killed."""
    program = """
import sys, time
from pathlib import Path
import numpy as np
from taca_jax.checkpoint import StreamedArray, save_streamed
from taca_jax.models.tiny_vae import TAEF1

def pieces():
    yield (0,), np.zeros(4, np.float32)
    print("half", flush=True)
    time.sleep(60)

array = StreamedArray((2, 4), np.dtype(np.float32), pieces, stacked=True)
save_streamed(Path(sys.argv[1]), TAEF1, {"a": array})
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "m")], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"half\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert not (tmp_path / "m").exists()
    assert "is no model folder" in message(tmp_path / "m")
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    save_model(tmp_path / "m", MODELS["pixels"]())
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_streamed_arrays_are_the_arrays(tmp_path):
    """Layer by layer, bfloat16, with a layer of zeros, which a sparse store might leave out."""
    model = MODELS["flux"]()
    kernel = model.double_blocks.img.out.kernel
    kernel.set_value(kernel.get_value().at[1].set(0))

    def streamed(param):
        array = np.asarray(param.get_value().astype(jnp.bfloat16))
        stacked = array.ndim == 3
        pieces = [((i,), array[i]) for i in range(len(array))] if stacked else [((), array)]
        return StreamedArray(array.shape, array.dtype, lambda: iter(pieces), stacked)

    save_streamed(
        tmp_path / "m", FLUX, {name: streamed(p) for name, p in flat_params(model).items()}
    )
    save_model(tmp_path / "n", model, dtype=jnp.bfloat16)
    by_layer, at_once = (
        load_model(tmp_path / name, LoadOptions(dtype=jnp.float32)) for name in "mn"
    )
    assert equal(at_once, by_layer)
