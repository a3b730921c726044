"""Runs of several processes equal those of one, and go on as other numbers of them."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from taca_jax.config.json_text import to_json
from taca_jax.data.config import DataConfig
from taca_jax.nn.lora import LoRAConfig
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.training.optimizer import OptimizerConfig
from tests.compare import relative_error
from tests.processes import run_cluster, run_python
from tests.training.checkpoints import logged, saved_checkpoint, saved_steps
from tests.training.tiny import tiny_config

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 10, 2
SCRIPT = ("-m", "tests.training.stopped_run")


def config_for(out_dir, **changes):
    usual = {
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "keep_checkpoints": 10,
        "data": DataConfig("generated:shapes/50", 8, 40),  # 80 samples: into a second epoch
    }
    return tiny_config(out_dir, **(usual | changes))


def started(config, *arguments, processes=1, devices=8):
    """Runs it, and says what the processes left."""
    file = config.run_dir.parent / f"{config.run_dir.name}.json"
    file.write_text(to_json(config))
    command = (*SCRIPT, str(file), *map(str, arguments))
    if processes == 1:
        return [run_python(*command, devices=devices)]
    return run_cluster(*command, processes=processes, devices=devices)


def errors(done):
    return "\n".join(each.stderr[-3000:] for each in done)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process on eight devices."""
    config = config_for(
        tmp_path_factory.mktemp("one") / "run",
        sample_every=STEPS,
        sample_prompts=("a red circle",),
    )
    done = started(config)
    assert done[0].returncode == 0, errors(done)
    return config


def assert_equal(config, other, within=1e-6):
    """Final parameters and every loss; the data's place, and so its order, exactly."""
    (ours, record), (theirs, expected) = (
        saved_checkpoint(c.run_dir, STEPS) for c in (config, other)
    )
    assert record["data"] == expected["data"]
    names = [name for name in theirs if name.startswith(".trained")]
    assert names
    assert ours.keys() == theirs.keys()
    difference = sum(float(((ours[n] - theirs[n]) ** 2).sum()) for n in names)
    norm = sum(float((theirs[n] ** 2).sum()) for n in names)
    print(f"parameters: relative distance {(difference / norm) ** 0.5:.1e}")
    assert (difference / norm) ** 0.5 < within
    for line, expected_line in zip(logged(config.run_dir), logged(other.run_dir), strict=True):
        assert line["step"] == expected_line["step"]
        assert line["loss"] == pytest.approx(expected_line["loss"], rel=1e-5)


def test_two_processes_train_as_one_does(one, tmp_path):
    config = dataclasses.replace(one, out_dir=str(tmp_path / "run"))
    done = started(config, processes=2, devices=4)
    assert [each.returncode for each in done] == [0, 0], errors(done)
    assert_equal(config, one)
    # The first writes and speaks for both, once.
    assert "model written to" in done[0].stdout
    # Gloo's threads write into one another's lines.
    assert not re.sub(r"\[Gloo\]|Rank \d+| is connected to .*|\s", "", done[1].stdout)
    assert "step " not in done[1].stderr
    for name in (f"samples/{STEPS:07d}.png", "model/pipeline.json"):
        assert (config.run_dir / name).read_bytes() == (one.run_dir / name).read_bytes()
    exported = "model/transformer/model.safetensors"
    ours, theirs = ((c.run_dir / exported).read_bytes() for c in (config, one))
    assert len(ours) == len(theirs)


def test_two_processes_train_a_lora_on_a_base_that_lies_over_both(one, tmp_path):
    adapt = {
        "base": str(one.run_dir / "model"),
        "model": None,
        "text": TextConfig(),
        "lora": LoRAConfig(rank=4),
        "taca": TacaConfig(threshold=500),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "steps": 4,
    }
    files = []
    for processes, mesh in ((1, MeshConfig()), (2, MeshConfig(fsdp=4, tensor=2))):
        config = config_for(tmp_path / f"run{processes}", mesh=mesh, **adapt)
        devices = 8 // processes if processes > 1 else 1
        done = started(config, processes=processes, devices=devices)
        assert [each.returncode for each in done] == [0] * processes, errors(done)
        assert "LoRA written to" in done[0].stdout
        files.append(load_file(config.run_dir / "lora.safetensors"))
    alone, together = files
    assert alone.keys() == together.keys()
    for name, array in alone.items():
        # Of the whole: Adam makes much of the rounding of single gradients that are nearly nothing.
        assert relative_error(together[name], array) <= 1e-4


def test_a_run_goes_on_on_fewer_devices_and_as_other_processes(one, tmp_path):
    """8 devices, then two processes of two, then one device; each is told to stop at some time."""
    config = config_for(tmp_path / "run")
    first = started(config, 3)
    assert first[0].returncode == 0, errors(first)
    assert f"told to stop: saved after step 3 of {STEPS}" in first[0].stderr
    config = dataclasses.replace(config, resume=True)
    second = started(config, 2, processes=2, devices=2)
    assert [each.returncode for each in second] == [0, 0], errors(second)
    assert "going on after step 3" in second[0].stdout
    assert "told to stop: saved after step " in second[0].stderr
    # Both know it, though the second alone was told.
    assert "told to stop" not in second[1].stderr
    (*_, stopped) = saved_steps(config.run_dir)
    assert 5 <= stopped < STEPS
    last = started(config, devices=1)
    assert last[0].returncode == 0, errors(last)
    assert f"going on after step {stopped}" in last[0].stdout
    assert_equal(config, one)


@pytest.mark.parametrize("damage", ["of one", "of both"])
def test_two_processes_pass_over_a_damaged_checkpoint(one, tmp_path, damage):
    """Also where only one of them reads what is damaged."""
    shutil.copytree(one.run_dir, tmp_path / "run")
    config = dataclasses.replace(one, out_dir=str(tmp_path / "run"), resume=True)
    config = dataclasses.replace(config, sample_every=0)
    state = config.run_dir / "checkpoints" / str(STEPS) / "state"
    if damage == "of both":
        shutil.rmtree(state)
    else:
        # Not those that each process wrote: Orbax has merged them into these.
        largest = max((state / "d").iterdir(), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        eighth = slice(len(content) // 2, len(content) * 5 // 8)
        content[eighth] = bytes(255 - byte for byte in content[eighth])
        largest.write_bytes(content)
    done = started(config, processes=2, devices=4)
    assert [each.returncode for each in done] == [0, 0], errors(done)
    assert f"warning: checkpoint {STEPS} cannot be read (" in done[0].stderr
    assert f"going on after step {STEPS - SAVE_EVERY}" in done[0].stdout
    assert [path.name for path in (config.run_dir / "damaged").iterdir()] == [str(STEPS)]
    assert_equal(config, one)


def test_a_loss_that_is_no_number_ends_every_process(tmp_path):
    config = config_for(tmp_path / "run", mesh=MeshConfig(data=-1, fsdp=1))
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30, clip_norm=None),
    )
    done = started(config, processes=2, devices=4)
    assert all(each.returncode != 0 for each in done), errors(done)
    (line,) = [line for line in done[0].stderr.splitlines() if line.startswith("error: ")]
    assert line.count("train-") == 8  # the other process's samples too
    assert all(
        np.isfinite(array).all()
        for step in saved_steps(config.run_dir)
        for array in saved_checkpoint(config.run_dir, step)[0].values()
    )
