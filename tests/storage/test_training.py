"""Runs whose base, folder and cache are in a bucket."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, load_file

from taca_jax.config.json_text import to_json
from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_folder
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.storage.places import place
from taca_jax.training import cache_stage
from taca_jax.training.checkpoints import newest_step
from taca_jax.training.run import train
from taca_jax.weights.pipeline_folders import open_pipeline
from tests.compare import relative_error
from tests.processes import run_cluster
from tests.training.tiny import lora_changes, tiny_config, tiny_pipeline

STEPS = 6


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline().save(folder)
    return folder


@pytest.fixture
def base(bucket, pipeline):
    bucket.add_folder(pipeline, "bases/tiny")
    return "gs://bucket/bases/tiny"


def config_for(out_dir, base, **changes):
    return tiny_config(out_dir, **lora_changes(str(base)), steps=STEPS, **changes)


@pytest.fixture(scope="module")
def local(pipeline, tmp_path_factory):
    """The LoRA of the same run on a disk."""
    run = tmp_path_factory.mktemp("local") / "run"
    train(config_for(run, pipeline))
    return load_file(run / "lora.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if not np.array_equal(a[name], b[name])]


def logged(bucket, run="run"):
    return [json.loads(line)["step"] for line in bucket.read(f"{run}/metrics.jsonl").splitlines()]


def test_a_run_in_a_bucket_is_that_on_a_disk_resumed_or_not(
    bucket, base, local, monkeypatch, tmp_path, capsys
):
    train(config_for("gs://bucket/run", base))
    same(load(bucket.read("run/lora.safetensors")), local)
    assert logged(bucket) == list(range(1, STEPS + 1))
    assert newest_step(place("gs://bucket/run")) == STEPS
    assert {name.split("/")[2] for name in bucket.names("run/checkpoints/")} == {"4", "6"}
    assert bucket.names("run/loras/") == [f"run/loras/step-{n:06}.safetensors" for n in (4, 6)]
    assert bucket.names("run/tensorboard/")

    with pytest.raises(UserError, match="gs://bucket/run holds a run already; resume=true"):
        train(config_for("gs://bucket/run", base))
    for name in [*bucket.names("run/checkpoints/6"), "run/lora.safetensors"]:
        bucket.storage.delete_file("bucket", name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    train(config_for("gs://bucket/run", base, resume=True))
    assert "going on after step 4" in capsys.readouterr().out
    same(load(bucket.read("run/lora.safetensors")), local)
    assert logged(bucket) == list(range(1, STEPS + 1))


def test_a_cache_in_a_bucket_serves_runs(bucket, base, pipeline, monkeypatch, tmp_path):
    """As one on a disk does, also on another machine, which then reads no picture."""
    monkeypatch.setattr(cache_stage, "_PROBE", "a red circle")  # of words that the model knows
    data = DataConfig("generated:shapes/24", 2, 40, encode="cache", cache="gs://bucket/cache")
    train(config_for("gs://bucket/run", base, data=data))
    assert bucket.names("cache/shards/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    bucket.asked.clear()
    train(config_for("gs://bucket/run2", base, data=data))
    assert not [name for method, name in bucket.asked if method == "POST" and "cache" in name]
    assert [name for _, name in bucket.asked if name.startswith("cache/shards/")]
    assert bucket.read("run/lora.safetensors") == bucket.read("run2/lora.safetensors")
    on_disk = replace(data, cache=str(tmp_path / "cache"))
    train(config_for(tmp_path / "run", pipeline, data=on_disk))
    same(load(bucket.read("run/lora.safetensors")), load_file(tmp_path / "run/lora.safetensors"))


@pytest.mark.slow
def test_two_processes_write_one_folder_and_go_on(bucket, base, local, tmp_path, environment):
    """Each writes its part of a checkpoint; on other machines they go on with the whole."""
    config = replace(config_for("gs://bucket/run", base, mesh=MeshConfig(fsdp=2)), steps=3)

    def ran(config, machine):
        file = tmp_path / f"{machine}.json"
        file.write_text(to_json(config))
        copies = {"XDG_CACHE_HOME": str(tmp_path / machine)}
        words = ("-m", "tests.training.stopped_run", str(file))
        ours = {**environment, **bucket.environment, **copies}
        done = run_cluster(*words, processes=2, devices=1, environment=ours)
        assert [each.returncode for each in done] == [0, 0], [e.stderr[-3000:] for e in done]
        return done

    ran(config, "one")
    written = [name for method, name in bucket.asked if method == "POST"]
    for process in ("process_0", "process_1"):
        assert [name for name in written if "checkpoints/3/state/" in name and process in name]
    second = ran(replace(config, resume=True, steps=STEPS), "another")
    assert "going on after step 3" in second[0].stdout
    assert logged(bucket) == list(range(1, STEPS + 1))
    ours = load(bucket.read("run/lora.safetensors"))
    assert ours.keys() == local.keys()
    assert max(relative_error(ours[name], local[name]) for name in local) <= 1e-4


def test_a_new_model_is_written_to_a_bucket_and_read_from_it(bucket):
    train(tiny_config("gs://bucket/run", steps=2))
    assert "run/model/pipeline.json" in bucket.names()
    assert "transformer" in open_pipeline("gs://bucket/run/model").models


def test_a_half_written_pipeline_is_none(bucket, pipeline):
    def fail():
        with whole_folder(place("gs://bucket/half"), "pipeline.json") as made:
            for file in pipeline.rglob("*"):
                if file.is_file():
                    to = made / file.relative_to(pipeline)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    to.write_bytes(file.read_bytes())
            bucket.seen = refuse_last

    def refuse_last(method, _, name):
        bucket.refused = 403 if name == "half/pipeline.json" and method == "POST" else None

    with pytest.raises(UserError, match="gs://bucket/half could not be written"):
        fail()
    bucket.seen = bucket.refused = None
    assert len(bucket.names("half/")) > 3
    with pytest.raises(UserError):
        open_pipeline("gs://bucket/half")


def test_what_is_not_there_is_one_line(bucket, base):
    with pytest.raises(UserError, match="gs://none cannot be used: there is no such bucket"):
        train(config_for("gs://none/run", base))
    with pytest.raises(UserError, match="gs://bucket/nothing is not there: the bucket has no such"):
        train(config_for("gs://bucket/run", "gs://bucket/nothing"))
