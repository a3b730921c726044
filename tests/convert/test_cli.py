"""`python -m convert`: what it makes, what it says, and what it refuses without leaving a trace."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from convert.cli import main
from taca_jax.autoencoders import vae_diffusers as vae
from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.formats import engine
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text import clip_layout as clip
from taca_jax.text import t5_layout as t5
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.t5 import T5Config, T5Encoder
from taca_jax.text.tokenizers import load_tokenizer
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests.random_models import random_model
from tests.shared import shared_path

T5 = T5Config(11, 8, 12, 2, 4, 2)
T5_SETTINGS = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 11,
    "d_model": 8,
    "d_ff": 12,
    "num_heads": 2,
    "d_kv": 4,
    "num_layers": 2,
}


def run(*words) -> None:
    main([str(word) for word in words])


def refused(capsys, *words) -> str:
    """The one line on stderr of a conversion that fails with status 1."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    capsys.readouterr()
    assert isinstance(stop.value.code, str)  # sys.exit(text): printed on stderr, status 1
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code


def original_t5(folder: Path, shards: int = 1, dim: int = T5.dim) -> T5Encoder:
    """A folder in transformers' layout, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(replace(T5, dim=dim))
    (folder / "config.json").write_text(json.dumps(T5_SETTINGS | {"d_model": dim}))
    tensors = engine.export(t5.TABLE, model)
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors)
        return model
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        write_tensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def original_clip(folder: Path, dim: int) -> None:
    """A CLIP text encoder's folder in transformers' layout."""
    folder.mkdir()
    model = random_model(CLIPConfig(11, 77, dim, 12, 2, 2, "quick_gelu", None, None))
    settings = {
        "model_type": "clip_text_model",
        "vocab_size": 11,
        "hidden_size": dim,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    write_tensors(folder / "model.safetensors", engine.export(clip.TABLE, model))


@pytest.mark.parametrize("shards", [1, 3])
def test_single_and_sharded_files_give_the_same_model(tmp_path, shards, capsys):
    model = original_t5(tmp_path / "src", shards)
    run("t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    again = load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32))
    assert again.config == T5
    for name, param in flat_params(model).items():
        np.testing.assert_array_equal(flat_params(again)[name].get_value(), param.get_value())
    assert f"{tmp_path / 'dst'}: " in capsys.readouterr().out
    assert (tmp_path / "dst" / "params").is_dir()


def test_dtype(tmp_path):
    original_t5(tmp_path / "src")
    run("t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst", "--dtype", "bfloat16")
    again = load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32))
    assert {p.dtype for p in flat_params(again).values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.fixture
def pipeline_folder(tmp_path) -> Path:
    """The golden pipeline with text encoders and tokenizers beside it."""
    src = tmp_path / "src"
    shutil.copytree(shared_path("golden/flux"), src)
    transformer = json.loads((src / "transformer" / "config.json").read_text())
    original_clip(src / "text_encoder", transformer["pooled_projection_dim"])
    original_t5(src / "text_encoder_2", dim=transformer["joint_attention_dim"])
    shutil.copytree(shared_path("assets/clip_tokenizer"), src / "tokenizer")
    shutil.copytree(shared_path("assets/t5_tokenizer"), src / "tokenizer_2")
    return src


def test_a_whole_pipeline(tmp_path, monkeypatch, pipeline_folder, capsys):
    """It finds its own tokenizers wherever it is moved to; another `tokenizer/` is not taken."""
    dst = tmp_path / "dst"
    run("flux", "--src", pipeline_folder, "--dst", dst)
    assert sorted(path.name for path in dst.iterdir()) == [
        "autoencoder",
        "pipeline.json",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
    ]
    said = capsys.readouterr().out
    for name in ("transformer", "autoencoder", "text_encoder", "text_encoder_2"):
        assert f"{dst / name}: " in said
    assert said.splitlines()[-1] == "left out: lora"

    shutil.rmtree(pipeline_folder)
    dst.rename(tmp_path / "moved")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    pipeline = FluxPipeline.from_pretrained("moved", dtype="float32")
    assert pipeline.transformer.config.guidance_embed
    assert pipeline.autoencoder.config.scaling_factor == pytest.approx(0.3611)
    assert pipeline.text_encoder.clip.config.dim == pipeline.transformer.config.pooled_dim
    assert pipeline.text_encoder.t5.config.dim == pipeline.transformer.config.txt_dim
    settings = pipeline.settings
    assert (settings.text_length, settings.steps, settings.guidance) == (512, 28, 3.5)
    prompts = ["a red circle left of a blue square", ""]
    expected = [
        load_tokenizer(str(shared_path(f"assets/{name}_tokenizer")), length)(prompts)
        for name, length in (("clip", 77), ("t5", 512))
    ]
    np.testing.assert_array_equal(pipeline.tokenizer(prompts), np.concatenate(expected, axis=1))


def test_a_bare_transformer_is_a_model_folder(tmp_path):
    src = shared_path("golden/flux/transformer")
    run("flux", "--src", src, "--dst", tmp_path / "dst")
    assert (
        load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32)).config.num_double_blocks == 2
    )


def test_what_is_not_there_is_said(tmp_path, capsys, pipeline_folder):
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        shutil.rmtree(pipeline_folder / name)
    run("flux", "--src", pipeline_folder, "--dst", tmp_path / "dst")
    said = capsys.readouterr().out
    assert "has no text_encoder_2, tokenizer_2, which prompts are read with" in said
    assert "has no vae, which pictures are made with" in said


def test_without_a_scheduler_the_published_noise_levels_are_taken(tmp_path, capsys):
    shutil.copytree(shared_path("golden/flux"), tmp_path / "src")
    shutil.rmtree(tmp_path / "src" / "scheduler")
    run("flux", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert "has no scheduler; the published noise levels are taken" in capsys.readouterr().out
    settings = json.loads((tmp_path / "dst" / "pipeline.json").read_text())
    assert settings["schedule"] == asdict(FlowSchedule())


def test_autoencoders(tmp_path):
    run("vae", "--src", shared_path("golden/flux/vae"), "--dst", tmp_path / "vae")
    tensors = open_tensors(shared_path("golden/flux/vae"))
    model = load_model(tmp_path / "vae", LoadOptions(dtype=jnp.float32))
    for key, array in engine.export(vae.TABLE, model).items():
        np.testing.assert_array_equal(array, tensors.read(key))
    run("tiny_vae", "--src", shared_path("assets/tae") / "taef1", "--dst", tmp_path / "tiny")
    assert load_model(tmp_path / "tiny", LoadOptions(dtype=jnp.float32)).config == TAEF1


def test_lora_there_and_back(tmp_path, capsys):
    src = shared_path("golden/flux/lora/pytorch_lora_weights.safetensors")
    native, peft = tmp_path / "native.safetensors", tmp_path / "peft.safetensors"
    run("lora", "--src", src, "--dst", native, "--to", "native")
    said = capsys.readouterr().out
    assert f"{src}: PEFT LoRA of 25 layers, rank 4, strength 1, on double_blocks (img.out" in said
    assert f"{native}: native LoRA of 25 layers, rank 4, strength 1, on double_blocks" in said
    assert open_tensors(native).shapes["single_blocks.qkv.q.lora_a"] == (3, 96, 4)
    run("lora", "--src", native, "--dst", peft, "--to", "peft")
    ours, theirs = open_tensors(peft), open_tensors(src)
    assert ours.shapes == theirs.shapes
    for name in theirs.shapes:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    assert "exists" in refused(capsys, "lora", "--src", src, "--dst", peft, "--to", "native")


def only(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_destination_with_something_in_it_is_left_alone(tmp_path, capsys):
    original_t5(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("x")
    for command in ("t5", "flux"):
        said = refused(capsys, command, "--src", tmp_path / "src", "--dst", tmp_path / "dst")
        assert f"{tmp_path / 'dst'} exists and is not empty" in said
    assert only(tmp_path / "dst", "precious")


def test_an_empty_destination_is_used(tmp_path):
    original_t5(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    run("t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert only(tmp_path / "dst", "config.json", "params")


def test_sources_that_are_not_there_or_of_another_model(tmp_path, capsys):
    where = ("--src", tmp_path / "src", "--dst", tmp_path / "dst")
    for kind in ("t5", "clip"):
        assert "src is not there; give a .safetensors file" in refused(capsys, kind, *where)
    original_t5(tmp_path / "src")
    assert "has no field in_channels" in refused(capsys, "flux", *where)
    (tmp_path / "src" / "model.safetensors").unlink()
    assert "has no .safetensors file" in refused(capsys, "t5", *where)
    assert "should have one pair" in refused(capsys, "tiny_vae", *where)
    assert only(tmp_path, "src")


def test_wrong_keys_and_shapes_are_all_named(tmp_path, capsys):
    original_t5(tmp_path / "src")
    tensors = open_tensors(tmp_path / "src")
    arrays = {name: tensors.read(name) for name in tensors.shapes}
    arrays["surplus"] = arrays.pop("encoder.final_layer_norm.weight")
    arrays["shared.weight"] = np.zeros((12, 8), np.float32)
    write_tensors(tmp_path / "src" / "model.safetensors", arrays)
    said = refused(capsys, "t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert "1 missing: encoder.final_layer_norm.weight" in said
    assert "1 left over: surplus" in said
    assert "shared.weight is (12, 8) instead of (11, 8)" in said
    assert only(tmp_path, "src")


def test_a_truncated_part_stops_the_whole_pipeline(tmp_path, pipeline_folder, capsys):
    file = pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = refused(capsys, "flux", "--src", pipeline_folder, "--dst", tmp_path / "dst")
    assert f"{file} is truncated or damaged" in said
    assert only(tmp_path, "src")


def test_a_missing_shard(tmp_path, capsys):
    original_t5(tmp_path / "src", shards=3)
    (tmp_path / "src" / "model-00002-of-00003.safetensors").unlink()
    said = refused(capsys, "t5", "--src", tmp_path / "src", "--dst", tmp_path / "dst")
    assert "1 of the 3 shards" in said
    assert "model-00002-of-00003.safetensors" in said
    assert only(tmp_path, "src")


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    src = shared_path("golden/flux")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        said = refused(capsys, "flux", "--src", src, "--dst", tmp_path / "dst")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written (File too large)" in said
    assert only(tmp_path)


def test_a_lora_of_nothing_we_know(tmp_path, capsys):
    write_tensors(tmp_path / "x.safetensors", {"lora_unet.lora_down.weight": np.zeros((2, 3))})
    where = ("--src", tmp_path / "x.safetensors", "--dst", tmp_path / "y.safetensors")
    said = refused(capsys, "lora", *where, "--to", "peft")
    assert "lora_unet.lora_down.weight is unknown" in said
    assert only(tmp_path, "x.safetensors")


def test_as_a_program(tmp_path):
    """One line on stderr, status 1, no traceback."""
    words = ["vae", "--src", str(tmp_path / "no"), "--dst", str(tmp_path / "dst")]
    done = subprocess.run(
        [sys.executable, "-m", "convert", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_memory_does_not_grow_with_the_model(tmp_path):
    """32 layers of 4 MB each; at its peak there are only a few of them."""
    program = """
import sys
import numpy as np
from pathlib import Path
from taca_jax.checkpoint import StreamedArray, save_streamed
from taca_jax.models.tiny_vae import TAEF1

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1024

def pieces():
    for i in range(32):
        yield (i,), np.full(2**20, i, np.float32)
        seen.append(resident())

def once():
    yield (0,), np.zeros(4, np.float32)

seen = []
small = StreamedArray((1, 4), np.dtype(np.float32), once, stacked=True)
save_streamed(Path(sys.argv[1]) / "small", TAEF1, {"a": small})
before = resident()
large = StreamedArray((32, 2**20), np.dtype(np.float32), pieces, stacked=True)
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
