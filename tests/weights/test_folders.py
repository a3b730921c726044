"""Model folders: what is written comes back, and nothing else is taken for it."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import FLUX_KIND, FluxTransformer
from taca_jax.formats.tensor_files import LazyTensor, open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.nn.quantization import quantize
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.parallel.rules import parameter_sharding
from taca_jax.text.t5 import T5_KIND
from taca_jax.weights import folders
from taca_jax.weights.folders import (
    load_config,
    load_model,
    open_parameters,
    save_model,
    save_streamed,
)
from taca_jax.weights.loading import LoadOptions
from tests.models import CLIP, FLUX, SD3, T5, TINY_VAE, VAE
from tests.random_models import random_model

MODELS = {
    "flux": lambda: random_model(FLUX),
    "sd3": lambda: random_model(SD3),
    "t5": lambda: random_model(T5),
    "clip": lambda: random_model(CLIP),
    "vae": lambda: random_model(VAE),
    "tiny_vae": lambda: random_model(TINY_VAE),
    "pixels": lambda: Pixels(PixelsConfig(shift_factor=0.5, scaling_factor=4.0)),
}


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


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_comes_back(tmp_path, kind):
    model = MODELS[kind]()
    save_model(tmp_path / "m", model)
    again = load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32))
    assert type(again) is type(model)
    assert again.config == model.config
    assert equal(again, model)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["kind"] == kind
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_model_without_parameters_is_its_config_alone(tmp_path):
    save_model(tmp_path / "m", MODELS["tiny_vae"]())
    save_model(tmp_path / "m", MODELS["pixels"]())
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["config.json"]
    (tmp_path / "m" / "config.json").write_text('{"kind": "pixels", "scaling_factor": 0}')
    assert "pixels.scaling_factor is 0.0; it must be positive and finite" in message(tmp_path / "m")


def test_dtypes_of_file_parameters_and_activations_are_three_things(tmp_path, model):
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


def test_parameters_land_where_the_table_of_their_kind_says(tmp_path, model):
    """Over several devices in test_sharded_models.py."""
    save_model(tmp_path / "m", model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    again = load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32, mesh=mesh))
    for path, param in flat_params(again).items():
        expected = parameter_sharding(FLUX_KIND.sharding, path, param.shape, mesh)
        assert param.get_value().sharding == expected
    assert equal(again, model)


def test_lora_factors_stay_out(tmp_path):
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
    known = (
        "blip_vqa, clip, clip_score, flux, flux2, patched_vae, pixels, qwen3, sd3, t5, "
        "tiny_vae, vae"
    )
    assert f"says kind 'sdxl'; expected one of {known}" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "taca-convert" in message(tmp_path)
    save_model(tmp_path / "m", model)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_heds": 2}))
    assert "unknown key num_heds; did you mean num_heads?" in message(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").unlink()
    assert "m has no model.safetensors; write the folder again" in message(tmp_path / "m")
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


def test_a_folder_of_an_older_version_says_how_to_make_it_anew(tmp_path, model):
    """It had its parameters in params/, a folder of Orbax."""
    save_model(tmp_path / "m", model)
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "params").mkdir()
    said = message(tmp_path / "m")
    assert "was written by an older version, with its parameters in params/; make it anew" in said
    assert "taca-convert flux --src ORIGINAL --dst NEW_FOLDER" in said
    with pytest.raises(UserError, match="written by an older version"):
        open_parameters(tmp_path / "m")


def test_parameters_are_read_by_others_too(tmp_path, model):
    save_model(tmp_path / "m", model, dtype=jnp.bfloat16)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    params = flat_params(model)
    assert stored.keys() == params.keys()
    for name, param in params.items():
        expected = np.asarray(param.get_value().astype(jnp.bfloat16))
        assert stored[name].dtype == expected.dtype
        np.testing.assert_array_equal(stored[name], expected)


def test_a_quantised_model_is_not_written(tmp_path):
    model = random_model(replace(T5, dim=32, ff_dim=32, head_dim=16))
    quantize(model, T5_KIND, "nf4")
    with pytest.raises(UserError, match="a quantised model is not written; keep the one that"):
        save_model(tmp_path / "q", model)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_folder(tmp_path):
    """A limit on the size of files refuses a write as a full disk does."""
    old = MODELS["tiny_vae"]()
    save_model(tmp_path / "m", old)
    large = random_model(replace(T5, vocab_size=5000))
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
from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.formats.tensor_files import LazyTensor
from taca_jax.weights.folders import save_streamed

def pieces():
    yield np.zeros(4, np.float32)
    print("half", flush=True)
    time.sleep(60)

save_streamed(Path(sys.argv[1]), TAEF1, {"a": LazyTensor((2, 4), np.dtype(np.float32), pieces)})
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


@pytest.mark.parametrize("at_once", [0, 2**20])
def test_streamed_parameters_are_those_of_the_model(tmp_path, monkeypatch, model, at_once):
    """Stacks of a saved model layer by layer, or at once, and those that come from elsewhere."""
    monkeypatch.setattr(folders, "AT_ONCE", at_once)

    def streamed(param):
        array = np.asarray(param.get_value().astype(jnp.bfloat16))
        return LazyTensor(array.shape, array.dtype, lambda: iter(array))

    save_streamed(
        tmp_path / "m", FLUX, {name: streamed(p) for name, p in flat_params(model).items()}
    )
    save_model(tmp_path / "n", model, dtype=jnp.bfloat16)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()


def test_memory_does_not_grow_with_the_model(tmp_path):
    """32 layers of 4 MB each; at its peak there are only a few of them."""
    program = """
import sys
import numpy as np
from pathlib import Path
from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.formats.tensor_files import LazyTensor
from taca_jax.weights.folders import save_streamed

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1024

def pieces():
    for i in range(32):
        yield np.full(2**20, i, np.float32)
        seen.append(resident())

seen = []
small = LazyTensor((4,), np.dtype(np.float32), lambda: [np.zeros(4, np.float32)])
save_streamed(Path(sys.argv[1]) / "small", TAEF1, {"a": small})
before = resident()
large = LazyTensor((32, 2**20), np.dtype(np.float32), pieces)
save_streamed(Path(sys.argv[1]) / "large", TAEF1, {"a": large})
print(max(seen) - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the resident memory from /proc")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        # glibc would keep freed layers in each thread's arena, more or fewer by the system's load.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 16
