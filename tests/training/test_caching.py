"""Encoded examples: what a cache holds, how it goes on and whom it serves, and training from it."""

import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.config.json_text import to_json
from taca_jax.data.cache import reader as cache_reader
from taca_jax.data.cache.files import encoded
from taca_jax.data.cache.manifest import read_manifest
from taca_jax.data.cache.writer import CacheWriter
from taca_jax.data.config import DataConfig
from taca_jax.errors import StoppedError, UserError
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.nn.lora import LoRAConfig
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.text.encoders import T5Text
from taca_jax.text.tokenizers import load_tokenizer
from taca_jax.training import cache_stage
from taca_jax.training import run as run_module
from taca_jax.training.cache_stage import ready_cache
from taca_jax.training.encoding import Encoders
from taca_jax.training.inputs import open_loader
from taca_jax.training.models import RunModels, TextToImage, open_models
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.run import train
from taca_jax.training.signals import Notice
from taca_jax.training.step import make_trainer
from tests.compare import relative_error
from tests.processes import run_cluster
from tests.random_models import random_model
from tests.training.tiny import FLUX, T5, tiny_config, tiny_pipeline

VAE = VAEConfig(
    image_channels=3,
    latent_channels=4,
    channels=(8, 8),
    layers_per_block=1,
    groups=4,
    scaling_factor=0.7,
    shift_factor=0.1,
)
SIZES = [(32, 32)] * 5 + [(48, 32)] * 6
BAD = 3
GOOD = [i for i in range(len(SIZES)) if i != BAD]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One of them cannot be read, some have several captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        captions = [f"{i} {word}" for word in ("a", "b", "c")[: 1 + i % 3]]
        (folder / f"{i:02}.json").write_text(json.dumps({"captions": captions}))
    (folder / f"{BAD:02}.png").write_bytes(b"torn")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pipeline = tiny_pipeline(dataclasses.replace(FLUX, latent_channels=4, patch_size=2))
    save(pipeline, folder)
    return folder


def save(pipeline, folder):
    pipeline.tokenizer = load_tokenizer("bytes", 6)
    pipeline.settings = dataclasses.replace(
        pipeline.settings, tokenizer="bytes", text_length=6, resolution=32
    )
    pipeline.text_encoder = T5Text(random_model(dataclasses.replace(T5, vocab_size=259)), pad_id=0)
    pipeline.autoencoder = random_model(VAE)
    pipeline.save(folder)


def config_of(base, pictures, out_dir, **changes):
    data = {
        "source": f"folder:{pictures}",
        "batch_size": 2,
        "resolution": 32,
        "aspect": "buckets",
        "max_aspect": 2.0,
        "caption_dropout": 0.25,
        "max_bad_share": 0.5,
        "encode": "cache",
    }
    names = {field.name for field in dataclasses.fields(DataConfig)} - {"seed"}
    data |= {name: changes.pop(name) for name in [*changes] if name in names}
    adapt = {
        "base": str(base),
        "model": None,
        "text": TextConfig(),
        "lora": LoRAConfig(rank=2, alpha=4),
        "taca": TacaConfig(threshold=500),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "data": DataConfig(**data),
    }
    return tiny_config(out_dir, **(adapt | changes))


def ready(config):
    return ready_cache(open_models(config), Notice(""))


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))


@pytest.fixture(scope="module")
def made(base, pictures, tmp_path_factory):
    """(configuration, folder) of a complete cache. Not to be changed."""
    out_dir = tmp_path_factory.mktemp("made")
    config = config_of(base, pictures, out_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out_dir / "kept"))
        ready(config)
    return config, config.cache_dir


def own(made, tmp_path, **changes):
    """The same cache at another place, to be changed."""
    config, folder = made
    shutil.copytree(folder, tmp_path / "cache")
    data = dataclasses.replace(config.data, cache=str(tmp_path / "cache"))
    return dataclasses.replace(config, data=data, **changes)


def test_a_cache_gives_what_is_made_in_every_step(made):
    """The same pictures in the same order, with the same captions, as the models see them."""
    config, folder = made
    assert len(encoded(folder)) == len(SIZES) - 1
    cache = ready(config)
    models = open_models(config)
    inputs = models.load_inputs()
    vae_graph, vae = nnx.split(inputs.autoencoder)
    text_graph, text = nnx.split(inputs.text_encoder)

    @jax.jit
    def encoded_images(state, images):
        return nnx.merge(vae_graph, state).encode(images.astype(np.float32) / 127.5 - 1)

    @jax.jit
    def encoded_text(state, tokens):
        return nnx.merge(text_graph, state)(tokens)

    online = dataclasses.replace(config, data=dataclasses.replace(config.data, encode="online"))
    dropped = 0
    with (
        open_loader(dataclasses.replace(models, config=online), inputs) as expected,
        open_loader(models, cache) as loader,
    ):
        for _ in range(12):
            theirs, ours = next(expected), next(loader)
            assert ours["id"] == theirs["id"]
            assert f"{BAD:02}.png" not in ours["id"]
            mean = (ours["mean"] - VAE.shift_factor) * VAE.scaling_factor
            assert relative_error(mean, encoded_images(vae, theirs["image"])) < 1e-6
            found = encoded_text(text, theirs["tokens"])
            assert relative_error(ours["txt"], found.txt) < 1e-6
            assert relative_error(ours["pooled"], found.pooled) < 1e-6
            dropped += int((theirs["tokens"][:, 1] == 0).sum())
        assert loader.get_state() == expected.get_state()
    assert 0 < dropped < 24


def watched(monkeypatch):
    """The batches that are encoded from now on, each with its number of captions."""
    seen = []
    start = Encoders.start
    monkeypatch.setattr(
        Encoders, "start", lambda self, *batch: (seen.append(len(batch[1])), start(self, *batch))[1]
    )
    return seen


def test_an_interrupted_cache_goes_on(made, base, pictures, tmp_path, monkeypatch):
    config = config_of(base, pictures, tmp_path / "run")
    add, seen = CacheWriter.add, watched(monkeypatch)
    with monkeypatch.context() as patch:

        def stop(self, example, *arguments):
            if example == 7:
                raise KeyboardInterrupt
            self._shard_bytes = 1
            add(self, example, *arguments)

        patch.setattr(CacheWriter, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            ready(config)
    before = encoded(config.cache_dir).tolist()
    assert 0 < len(before) < len(SIZES) - 1
    seen.clear()
    # Batches of another size now: pictures are cut as they were when it was begun.
    data = dataclasses.replace(config.data, batch_size=4)
    cache = ready(dataclasses.replace(config, data=data))
    left = [i for i in range(len(SIZES)) if i not in before and i != BAD]
    assert sum(seen) == sum(1 + i % 3 for i in left)
    reference = ready(made[0])
    for i in range(len(SIZES)):
        if i != BAD:
            assert cache[i]["id"] == reference[i]["id"]
            np.testing.assert_allclose(cache[i]["latents"], reference[i]["latents"], atol=1e-5)
    seen.clear()
    ready(config)
    assert seen == []


def test_told_to_stop_it_keeps_what_is_encoded(base, pictures, tmp_path, monkeypatch):
    config = config_of(base, pictures, tmp_path)
    add, added = CacheWriter.add, []

    def noted(self, example, *arguments):
        added.append(example)
        if len(added) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, example, *arguments)

    monkeypatch.setattr(CacheWriter, "add", noted)
    with pytest.raises(StoppedError, match=r"\d pictures are encoded; .*resume=true"):
        train(config)
    assert 3 <= len(added) < len(SIZES) - 1
    assert encoded(config.cache_dir).tolist() == sorted(added)
    ready(config)
    assert len(added) == len(set(added)) == len(SIZES) - 1


def test_a_complete_cache_needs_neither_models_nor_pictures(made, tmp_path, monkeypatch):
    config = own(made, tmp_path)
    monkeypatch.setattr(RunModels, "load_inputs", None)
    monkeypatch.setattr(cache_stage, "open_data", None)
    assert len(ready(config)) == len(SIZES)


def test_processes_that_see_other_files_compare_the_models_together(made, tmp_path, monkeypatch):
    """Another process's answers stand for its own: what one alone would skip, it takes part in."""
    config = own(made, tmp_path)
    answers = iter([False, True, True, False])  # no cache, a cache, complete, of the same files
    monkeypatch.setattr(cache_stage, "all_of", lambda holds: next(answers) and holds)

    def compared(*arguments, **options):
        raise InterruptedError

    monkeypatch.setattr(RunModels, "load_inputs", compared)
    with pytest.raises(InterruptedError):
        ready(config)
    monkeypatch.setattr(cache_stage, "all_of", lambda holds: False)
    with pytest.raises(UserError, match="holds a cache for some processes and none for others"):
        ready(config)


@pytest.mark.parametrize(
    "name", ["ae.safetensors", "vae/shard", "clip/t5.safetensors", "tokenizer/a", "taef1_decoder"]
)
def test_what_a_pipeline_is_read_from_is_told_apart(pictures, tmp_path, name):
    files = {
        "transformer": "flux.safetensors",
        "autoencoder": "vae/index",
        "text_encoder": "clip/t5.safetensors",
        "text_encoder_2": "ae.safetensors",
        "text_encoder_3": "taef1",
    }
    for file in (*files.values(), "vae/config.json", "clip/other", "tokenizer/b"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    stored = SimpleNamespace(
        where=tmp_path / files["transformer"],
        tokenizers=tmp_path,
        models={part: SimpleNamespace(where=str(tmp_path / file)) for part, file in files.items()},
    )
    models = SimpleNamespace(config=config_of(stored.where, pictures, tmp_path), stored=stored)
    (tmp_path / "taef1").unlink()  # the beginning of two files' names
    before = cache_stage._files_stamp(models)
    for other in ("other.safetensors", "flux.safetensors", "clip/another"):
        (tmp_path / other).write_text("changed")
    assert cache_stage._files_stamp(models) == before
    (tmp_path / name).write_text("changed")
    assert cache_stage._files_stamp(models) != before


def test_a_cache_killed_before_its_first_manifest_is_begun_anew(made, tmp_path):
    config = own(made, tmp_path)
    shutil.rmtree(config.cache_dir / "shards")
    (config.cache_dir / "manifest.json").unlink()
    (config.cache_dir / ".manifest.json.a1b2.partial").mkdir()
    assert read_manifest(config.cache_dir) is None
    (config.cache_dir / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty and no cache"):
        read_manifest(config.cache_dir)


def test_what_is_damaged_is_encoded_again(made, tmp_path, monkeypatch):
    config = own(made, tmp_path)
    (shard,) = (config.cache_dir / "shards").iterdir()
    records = shard / "records.array_record"
    content = bytearray(records.read_bytes())
    content[len(content) // 2 :][:1000] = b""
    records.write_bytes(content[: len(content) // 2])
    cache = ready(config)
    with pytest.raises(UserError, match=r"shards/000000 is damaged .*; remove that folder, and"):
        [cache[i] for i in range(len(SIZES)) if i != BAD]
    shutil.rmtree(shard)
    seen = watched(monkeypatch)
    ready(config)
    assert len(seen) == 6


def test_more_shards_than_files_that_may_be_open(made, tmp_path, monkeypatch):
    config = own(made, tmp_path)
    shards = config.cache_dir / "shards"
    for number in range(1, 4):
        shutil.copytree(shards / "000000", shards / f"{number:06}")
    monkeypatch.setattr(cache_reader, "_MOST_OPEN", 2)
    cache = ready(config)
    for _ in range(2):
        for shard in range(4):
            cache._read(shard, 0)
            assert len(cache._readers) <= 2
    (shards / "000000" / "records.array_record").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"records.* cannot be opened \(open\(\) failed: No such"):
        cache._read(0, 0)
    (tmp_path / "away").rename(shards / "000000" / "records.array_record")
    cache._read(0, 0)  # it was not the file's fault, and is read again
    index = shards / "000001" / "index.npy"
    for content in (b"", index.read_bytes()[:-5]):
        index.write_bytes(content)
        with pytest.raises(
            UserError, match=r"000001 is damaged \(.*\); remove that folder"
        ) as said:
            ready(config)
        one_line(said)


def one_line(refusal):
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_a_cache_of_other_weights_or_pictures_is_refused(made, base, pictures, tmp_path):
    config = own(made, tmp_path)
    changed = dataclasses.replace(config.data, aspect="square")
    with pytest.raises(UserError) as refusal:
        ready(dataclasses.replace(config, data=changed))
    assert "was made with data.aspect=buckets, now it is square; give another" in one_line(refusal)
    with pytest.raises(UserError, match="was made with dtype=float32, now it is bfloat16"):
        ready(dataclasses.replace(config, dtype="bfloat16"))
    other = tmp_path / "base"
    shutil.copytree(base, other)
    again = dataclasses.replace(config, base=str(other))
    ready(again)  # copied files are the same weights
    pipeline = FluxPipeline.from_pretrained(other, "float32")
    scale = pipeline.text_encoder.t5.final_norm.scale
    scale[...] = scale[...] * 1.001
    pipeline.save(other)
    with pytest.raises(UserError) as refusal:
        ready(again)
    assert "was made with another text_encoder (kind t5, sum" in one_line(refusal)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    data = dataclasses.replace(config.data, cache=str(tmp_path / "full"))
    with pytest.raises(
        UserError, match=r"full is not empty and no cache; give another data\.cache"
    ):
        ready(dataclasses.replace(config, data=data))


def test_steps_from_a_cache_compile_once_for_each_bucket(made):
    config, _ = made
    cache = ready(config)
    models = open_models(config)
    model = TextToImage(models.load_transformer(), None)
    trainer, trained = make_trainer(config, model, models.autoencoder)
    state, shapes = trainer.begin(trained), set()
    with open_loader(models, cache) as loader:
        for _ in range(6):
            batch, _ = run_module._next_batch(loader, 1, None)
            shapes.add(batch.mean.shape)
            state, metrics = trainer.run(state, batch)
    assert shapes == {(1, 2, 16, 16, 4), (1, 2, 12, 20, 4)}
    assert trainer.step._cache_size() == 2
    assert np.isfinite(metrics["loss"])


TOGETHER = """
import os, signal, sys, time
from pathlib import Path
import jax
from taca_jax.config.json_text import from_json
from taca_jax.data.cache.writer import CacheWriter
from taca_jax.errors import StoppedError
from taca_jax.parallel.mesh import make_mesh
from taca_jax.parallel.processes import join_processes
from taca_jax.training.cache_stage import ready_cache
from taca_jax.training.config import TrainConfig
from taca_jax.training.models import open_models
from taca_jax.training.signals import Notice
join_processes()
config = from_json(TrainConfig, Path(sys.argv[1]).read_text(), sys.argv[1])
add = CacheWriter.add
def slow_add(self, example, *arguments):  # a notice takes a while from process to process
    if jax.process_index() == 1 and "stop" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
        sys.argv.remove("stop")
    time.sleep(0.5)
    add(self, example, *arguments)
CacheWriter.add = slow_add
try:
    ready_cache(open_models(config).on_mesh(make_mesh(config.mesh)), Notice("go on so"))
except StoppedError as error:
    print(error)
"""


def written_by(config):
    """The examples in the shards, as often as they are there."""
    rows = [np.load(index) for index in (config.cache_dir / "shards").rglob("index.npy")]
    return np.sort(np.concatenate([each["example"] for each in rows])).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, tensor=1), MeshConfig(fsdp=1, tensor=2)])
def test_two_processes_write_each_example_once(made, base, pictures, tmp_path, mesh):
    """Where a sample lies over both, one of them writes it; a second start changes nothing."""
    config = config_of(base, pictures, tmp_path / "run", mesh=mesh)
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    environment = {"XDG_CACHE_HOME": str(tmp_path / "kept")}
    for _ in range(2):
        done = run_cluster(
            "-c", TOGETHER, str(file), processes=2, devices=1, environment=environment
        )
        assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
        assert written_by(config) == GOOD
    cache, reference = ready(config), ready(made[0])
    for i in GOOD:
        np.testing.assert_allclose(cache[i]["latents"], reference[i]["latents"], atol=1e-5)


@pytest.mark.slow
def test_two_processes_stop_encoding_together(base, pictures, tmp_path):
    """One of them is told to; both keep what they have, and the next start encodes the rest."""
    config = config_of(base, pictures, tmp_path / "run", mesh=MeshConfig(fsdp=2))
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    for stop in (["stop"], []):
        done = run_cluster(
            *("-c", TOGETHER, str(file), *stop),
            processes=2,
            devices=1,
            environment={"XDG_CACHE_HOME": str(tmp_path / "kept")},
        )
        assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
        told = ["pictures are encoded; go on so" in each.stdout for each in done]
        assert told == [bool(stop)] * 2
        found = written_by(config)
        assert (found == GOOD) != bool(stop)
        assert set(found) <= set(GOOD)
        assert len(found) == len(set(found)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("latents", ["mean", "sample"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_from_a_cache_has_the_losses_of_training_online(
    base, pictures, tmp_path, latents, dtype
):
    found = {}
    for encode_when in ("online", "cache"):
        config = config_of(
            base,
            pictures,
            tmp_path / encode_when,
            encode=encode_when,
            latents=latents,
            dtype=dtype,
            steps=6,
            grad_accumulation=2,
        )
        train(config)
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        found[encode_when] = [json.loads(line)["loss"] for line in lines]
        assert (config.run_dir / "lora.safetensors").is_file()
    assert len(found["cache"]) == 6
    np.testing.assert_allclose(
        found["cache"], found["online"], rtol=1e-5 if dtype == "float32" else 2e-2
    )
