"""Whole runs: what they leave, how they go on exactly, and how they end when they cannot."""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from taca_jax.autoencoders.pixels import PixelsConfig
from taca_jax.config.json_text import from_json, to_json
from taca_jax.data.config import DataConfig
from taca_jax.data.loader import Loader
from taca_jax.data.shapes.captions import CATEGORIES
from taca_jax.errors import StoppedError, UserError
from taca_jax.evaluation.shapes.config import EvalConfig
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.nn.layers import Quantized
from taca_jax.nn.lora import linears
from taca_jax.nn.quantization import encode
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.text.t5 import T5Config
from taca_jax.training import run as run_module
from taca_jax.training.checkpoints import Checkpoints
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.run import train
from taca_jax.training.step import TrainState
from taca_jax.weights.folders import load_config
from tests.processes import run_python
from tests.training.checkpoints import saved_checkpoint, saved_steps
from tests.training.tiny import lora_changes, tiny_config

STEPS, SAVE_EVERY = 6, 2
PROMPTS = ("a red circle", "three cyan triangles")
ROOT = Path(__file__).resolve().parents[2]


def base_config(out_dir, **changes):
    usual = {"steps": STEPS, "save_every": SAVE_EVERY, "keep_checkpoints": 3}
    return tiny_config(out_dir, **(usual | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never stopped. Not to be changed."""
    config = base_config(
        tmp_path_factory.mktemp("base") / "run", sample_every=4, sample_prompts=PROMPTS
    )
    train(config)
    return config


@pytest.fixture(scope="module")
def base(finished):
    """The pipeline folder that the run made."""
    return str(finished.run_dir / "model")


def lora_config(base, out_dir, **changes):
    return base_config(out_dir, **(lora_changes(base) | changes))


def saved(config, step=STEPS):
    """The arrays and the record of a checkpoint."""
    return saved_checkpoint(config.run_dir, step)


def assert_same_checkpoint(one, other, step=STEPS):
    (first, first_data), (second, second_data) = saved(one, step), saved(other, step)
    assert first_data == second_data
    assert first.keys() == second.keys()
    different = [name for name in first if not np.array_equal(first[name], second[name])]
    assert not different


def train_until(monkeypatch, config, step):
    """Trains, ended as Ctrl-C ends a run when it asks for the data of `step`."""
    real, calls = run_module._next_batch, []

    def stop(loader, parts, mesh):
        calls.append(None)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(loader, parts, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_next_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def metrics(config):
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# What a run leaves.


def test_a_run_leaves_its_record_metrics_checkpoints_and_samples(finished):
    run_dir = finished.run_dir
    recorded = from_json(type(finished), (run_dir / "config.json").read_text())
    assert recorded == finished
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert {"loss", "gradient_norm", "learning_rate", "seconds_per_step"} <= line.keys()
        assert all(np.isfinite(value) for value in line.values())
        assert line["samples_per_second"] == pytest.approx(2 / line["seconds_per_step"])
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir()) == [
        "2",
        "4",
        "6",
    ]
    drawn = sorted(p.name for p in (run_dir / "samples").iterdir())
    assert drawn == ["0000000.png", "0000004.png"]
    with Image.open(run_dir / "samples" / "0000004.png") as grid:
        assert grid.width > 2 * 520
        assert len(grid.convert("RGB").getcolors(100_000)) > 100
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))


def test_the_model_that_a_run_leaves_draws(base):
    pipeline = FluxPipeline.from_pretrained(base, "float32")
    first = pipeline("a red circle", steps=2, output="array").images
    assert first.shape == (1, 40, 40, 3)
    assert np.array_equal(first, pipeline("a red circle", steps=2, output="array").images)
    assert pipeline.settings.resolution == 40


def test_a_lora_run_leaves_a_file_that_loads(base, tmp_path, monkeypatch):
    config = lora_config(base, tmp_path / "run")
    train(config)
    state, _ = saved(config)
    trained = [name for name in state if name.startswith(".trained")]
    assert trained
    assert all("lora_" in name for name in trained)
    pipeline = FluxPipeline.from_pretrained(base, "float32")
    taca = TacaConfig(gamma=1.0, threshold=0)
    plain = pipeline("a red circle", steps=2, output="array", taca=taca).images
    pipeline.load_lora(config.run_dir / "lora.safetensors")
    adapted = pipeline("a red circle", steps=2, output="array", taca=taca).images
    assert np.abs(adapted - plain).max() > 1e-4
    for path, layer in linears(pipeline.transformer):
        if layer.lora_a is None:
            continue
        name = f".trained['transformer']{''.join(f'[{p!r}]' for p in path.split('.'))}"
        a, b = (state[f"{name}['{factor}'].value"] for factor in ("lora_a", "lora_b"))
        found = np.asarray(layer.lora_a[...] @ layer.lora_b[...]) * layer.lora_alpha_over_rank
        np.testing.assert_allclose(found, a @ b * 2, rtol=1e-4, atol=1e-6)
    # The LoRA run itself resumes exactly.
    other = lora_config(base, tmp_path / "other")
    train_until(monkeypatch, other, 6)
    train(dataclasses.replace(other, resume=True))
    assert_same_checkpoint(config, other)


def test_what_the_other_runs_do_not_ask_for(tmp_path):
    """bfloat16, recomputed activations, TACA without a LoRA, normalised pictures, cut captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        picture(folder / f"{i}.png", "a very long caption " * 50)
    config = folder_config(
        folder,
        tmp_path / "run",
        steps=2,
        dtype="bfloat16",
        remat="full",
        taca=TacaConfig(threshold=500),
        pixels=PixelsConfig(shift_factor=0.5, scaling_factor=2.0),
    )
    train(config)
    assert [np.isfinite(line["loss"]) for line in metrics(config)] == [True, True]
    state, _ = saved(config, 2)
    floats = {v.dtype for v in state.values() if v.dtype.kind == "f" or v.dtype.itemsize == 2}
    assert floats == {np.dtype(np.float32)}
    assert load_config(config.run_dir / "model" / "autoencoder") == config.pixels


def test_a_lora_does_not_go_on_with_another_base(base, tmp_path, monkeypatch):
    other = tmp_path / "base"
    shutil.copytree(base, other)
    config = lora_config(str(other), tmp_path / "run")
    train_until(monkeypatch, config, 3)
    pipeline = FluxPipeline.from_pretrained(other, "float32")
    bias = pipeline.transformer.img_in.bias
    bias[...] = bias[...] + 1e-3
    pipeline.save(other)
    with pytest.raises(UserError, match=r"the base is not the one that .*/run was trained on"):
        train(dataclasses.replace(config, resume=True))


def test_a_lora_does_not_go_on_with_its_base_in_other_bits(tmp_path):
    """The run's record says so before anything is loaded, and each checkpoint by itself."""
    config = lora_config("base", tmp_path, quantize="nf4", resume=True)
    (tmp_path / "config.json").write_text(to_json(config))
    with pytest.raises(UserError, match=r"with quantize=nf4 \(now int8\), which"):
        train(dataclasses.replace(config, quantize="int8"))

    def frozen(to):
        layer = nnx.Dict(kernel=nnx.Param(jnp.ones((32, 4))), kernel_scale=None)
        if to != "none":
            codes, scales = encode(layer.kernel[...], to)
            layer = nnx.Dict(kernel=Quantized(codes), kernel_scale=Quantized(scales))
        return nnx.state(nnx.Dict(transformer=layer))

    empty = nnx.State({})
    state = TrainState(jnp.int32(1), jnp.zeros(2, jnp.uint32), empty, optax.EmptyState(), None)
    with Checkpoints(tmp_path, keep=1, frozen=frozen("nf4")) as checkpoints:
        checkpoints.save(state, data=None)
        checkpoints.wait()
        assert checkpoints.restore(state, warn=pytest.fail) is not None
    for to, said in (("int8", "has transformer in int8"), ("none", "has nothing quantised")):
        with (
            Checkpoints(tmp_path, keep=1, frozen=frozen(to)) as checkpoints,
            pytest.raises(UserError, match=f"on a base with transformer in nf4, and .* {said}"),
        ):
            checkpoints.restore(state, warn=pytest.fail)


@pytest.mark.slow
def test_a_lora_trains_on_a_quantised_base_and_goes_on(base, tmp_path, monkeypatch):
    """Interrupted or not it is the same, to the last bit; its file is used as any other."""
    bits = {"quantize": "nf4", "quantize_text": "int8", "sample_every": 4}
    whole = lora_config(base, tmp_path / "whole", **bits, sample_prompts=PROMPTS)
    train(whole)
    parts = dataclasses.replace(whole, out_dir=str(tmp_path / "parts"))
    train_until(monkeypatch, parts, 5)
    train(dataclasses.replace(parts, resume=True))
    assert_same_checkpoint(whole, parts)
    assert saved(whole)[1]["quantized"] == {"transformer": "nf4", "text_encoder": "int8"}
    pipeline = FluxPipeline.from_pretrained(base, "float32", quantize="int8", quantize_text="nf4")
    pipeline.load_lora(whole.run_dir / "lora.safetensors")
    drawn = pipeline(PROMPTS[0], taca=TacaConfig(threshold=800), output="array").images
    assert np.isfinite(drawn).all()
    with pytest.raises(UserError, match="a quantised model is not written"):
        pipeline.save(tmp_path / "saved")


def test_the_measurement_at_the_end(base, tmp_path):
    evaluate = EvalConfig(prompts=1, steps=1, batch_size=6)
    config = lora_config(base, tmp_path, steps=1, evaluate=evaluate)
    train(config)
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(rows) == ["seen", "held-out"]
    for half in rows.values():
        assert list(half) == ["base", "base + TACA", "TACA + LoRA", "LoRA alone"]
        assert all(set(CATEGORIES) <= set(row["correct"]) for row in half.values())
    with Image.open(tmp_path / "evaluation.png") as grid:
        assert grid.width > 4 * 520


def test_a_base_keeps_the_guidance_that_is_best(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "evaluate_shapes", lambda *_, **__: 2.5)
    config = base_config(tmp_path, steps=1, evaluate=EvalConfig(guidances=(1.0, 2.5)))
    train(config)
    assert FluxPipeline.from_pretrained(tmp_path / "model").settings.guidance == 2.5


# Going on.


def test_stopped_and_resumed_is_never_stopped(finished, tmp_path, monkeypatch):
    config = base_config(tmp_path / "run", sample_every=4, sample_prompts=PROMPTS)
    train_until(monkeypatch, config, 6)  # between the checkpoints of steps 4 and 6
    assert [line["step"] for line in metrics(config)][-1] >= 4
    assert not (config.run_dir / "model").exists()
    train(dataclasses.replace(config, resume=True))
    assert_same_checkpoint(finished, config)
    lines, never = metrics(config), metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for one, other in zip(lines, never, strict=True):
        assert one["loss"] == other["loss"]
    for name in ("transformer", "text_encoder"):
        file = Path("model") / name / "model.safetensors"
        assert (config.run_dir / file).read_bytes() == (finished.run_dir / file).read_bytes()


def test_a_checkpoint_holds_the_state_of_its_step_though_training_goes_on(finished, tmp_path):
    """Saving is asynchronous, and the next step reuses the buffers."""
    config = base_config(tmp_path / "run", steps=SAVE_EVERY)
    train(config)
    assert_same_checkpoint(finished, config, SAVE_EVERY)


def test_the_newest_checkpoints_are_kept(tmp_path):
    def state(step):
        trained = {"kernel": jnp.full((2, 3), float(step))}
        return TrainState(jnp.int32(step), jnp.zeros(2, jnp.uint32), trained, (), None)

    with Checkpoints(tmp_path, keep=2, frozen=nnx.State({})) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(state(step), {"position": 10 * step})
            checkpoints.save(state(step), {"position": -1})  # it is there
    assert saved_steps(tmp_path) == [4, 5]
    with Checkpoints(tmp_path, keep=2, frozen=nnx.State({})) as checkpoints:
        found, data = checkpoints.restore(state(0), warn=pytest.fail)
    assert data == {"position": 50}
    assert np.array_equal(found.trained["kernel"], np.full((2, 3), 5.0))


@pytest.mark.slow
def test_accumulated_steps_of_muon_resume_exactly(tmp_path, monkeypatch):
    changes = {"grad_accumulation": 2, "optimizer": OptimizerConfig("muon", learning_rate=3e-3)}
    never = base_config(tmp_path / "never", **changes)
    train(never)
    assert metrics(never)[-1]["samples_per_second"] == pytest.approx(
        4 / metrics(never)[-1]["seconds_per_step"]
    )
    stopped = base_config(tmp_path / "stopped", **changes)
    train_until(monkeypatch, stopped, 4)
    train(dataclasses.replace(stopped, resume=True))
    assert_same_checkpoint(never, stopped)


KILLED = """
import os, signal, sys
import taca_jax.training.run as run
from taca_jax.config.json_text import from_json
from taca_jax.training.config import TrainConfig
from taca_jax.errors import UserError

real, step = run._next_batch, 0

def next_batch(loader, parts, mesh):
    global step
    step += 1
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(loader, parts, mesh)

run._next_batch = next_batch
run.train(from_json(TrainConfig, open(sys.argv[1]).read()))
"""


def run_script(script, config, tmp_path):
    (tmp_path / "config.json").write_text(to_json(config))
    return run_python("-c", script, str(tmp_path / "config.json"))


def test_killed_and_resumed_is_never_stopped(finished, tmp_path):
    config = base_config(tmp_path / "run", sample_every=4, sample_prompts=PROMPTS)
    killed = run_script(KILLED, config, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that the kill cut off
    train(dataclasses.replace(config, resume=True))
    assert_same_checkpoint(finished, config)
    assert [line["step"] for line in metrics(config)] == list(range(1, STEPS + 1))


def test_told_to_stop_and_resumed_is_never_stopped(finished, tmp_path, monkeypatch, capsys):
    config = base_config(tmp_path / "run")
    real, calls = run_module._next_batch, []

    def told(loader, parts, mesh):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(loader, parts, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_next_batch", told)
        with pytest.raises(StoppedError) as stop:
            train(config)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert one_line(stop) == (
        f"told to stop: saved after step 3 of 6; go on with resume=true out_dir={config.run_dir}"
    )
    assert metrics(config)[-1]["step"] == 3
    train(dataclasses.replace(config, resume=True))
    assert "going on after step 3" in capsys.readouterr().out
    assert_same_checkpoint(finished, config)
    assert [line["loss"] for line in metrics(config)] == [
        line["loss"] for line in metrics(finished)
    ]


def copied(finished, tmp_path, **changes):
    """The finished run at another place, to be gone on with."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return dataclasses.replace(finished, out_dir=str(tmp_path / "run"), resume=True, **changes)


def test_resuming_a_finished_run_makes_its_results_again(finished, tmp_path):
    config = copied(finished, tmp_path)
    shutil.rmtree(config.run_dir / "model")
    train(config)
    assert (config.run_dir / "model" / "pipeline.json").is_file()
    assert metrics(config) == metrics(finished)


def test_another_run_is_not_gone_on_with(finished, tmp_path):
    config = copied(finished, tmp_path)
    with pytest.raises(UserError, match="holds a run already; resume=true goes on with it"):
        train(dataclasses.replace(config, resume=False))
    optimizer = dataclasses.replace(config.optimizer, b1=0.8)
    data = dataclasses.replace(config.data, batch_size=4)
    with pytest.raises(
        UserError,
        match=r"with data\.batch_size=2 .now 4., optimizer\.b1=0\.9 .now 0\.8., seed=0 .now 1.,",
    ):
        train(dataclasses.replace(config, seed=1, optimizer=optimizer, data=data))
    assert from_json(type(config), (config.run_dir / "config.json").read_text()).seed == 0


def test_what_does_not_change_the_run_may_change(finished, tmp_path):
    data = dataclasses.replace(finished.data, max_bad_share=0.9)
    config = copied(
        finished,
        tmp_path,
        data=data,
        log_every=7,
        save_every=3,
        keep_checkpoints=1,
        sample_every=0,
        sample_prompts=(),
    )
    train(config)
    recorded = (config.run_dir / "config.json").read_text()
    assert from_json(type(config), recorded).data.max_bad_share == 0.9


def damage(newest, how):
    """Damages the files of a checkpoint."""
    if how == "half":  # a copy that was cut short
        for file in sorted(path for path in newest.rglob("*") if path.is_file())[::2]:
            file.unlink()
    elif how == "record":
        (newest / "record" / "metadata").write_text('{"posi')
    else:
        file = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        if how == "truncate":
            file.write_bytes(content[:middle])
        else:
            content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle:][:64])
            file.write_bytes(content)


# Orbax drops the reads that are under way when it finds damage, to be complained of when collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["truncate", "flip", "half", "record"])
def test_however_a_checkpoint_is_damaged_it_is_passed_over(tmp_path, how):
    def state(step):
        trained = {"kernel": jnp.asarray(np.random.default_rng(step).normal(size=(64, 64)))}
        return TrainState(jnp.int32(step), jnp.zeros(2, jnp.uint32), trained, (), None)

    with Checkpoints(tmp_path, keep=3, frozen=nnx.State({})) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step), {"position": step})
    damage(tmp_path / "checkpoints" / "3", how)
    warned = []
    with Checkpoints(tmp_path, keep=3, frozen=nnx.State({})) as checkpoints:
        found, data = checkpoints.restore(state(0), warn=warned.append)
    gc.collect()
    assert data == {"position": 2}
    assert np.array_equal(found.trained["kernel"], state(2).trained["kernel"])
    [line] = warned
    assert line.startswith("checkpoint 3 cannot be read (")
    assert line.endswith("); trying the one before")
    assert saved_steps(tmp_path) == [1, 2]
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["3"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_with_a_damaged_checkpoint_falls_back_to_the_one_before(finished, tmp_path, capsys):
    config = copied(finished, tmp_path)
    damage(config.run_dir / "checkpoints" / str(STEPS), "truncate")
    train(config)
    gc.collect()
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert len(warned) == 1
    assert warned[0].startswith(f"warning: checkpoint {STEPS} cannot be read (")
    assert warned[0].endswith("); trying the one before")
    assert_same_checkpoint(finished, config)
    assert [path.name for path in (config.run_dir / "damaged").iterdir()] == [str(STEPS)]
    assert [line["step"] for line in metrics(config)] == list(range(1, STEPS + 1))


def test_when_all_checkpoints_are_damaged_nothing_is_thrown_away(finished, tmp_path):
    config = copied(finished, tmp_path)
    for folder in (config.run_dir / "checkpoints").iterdir():
        shutil.rmtree(folder / "state")
    with pytest.raises(UserError, match=r"none of the checkpoints \[6, 4, 2\] in .* can be read"):
        train(config)
    assert len(list((config.run_dir / "checkpoints").iterdir())) == 3


# Not going on.


def one_line(refusal):
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    config = base_config(
        tmp_path / "run", optimizer=OptimizerConfig(learning_rate=1e30, clip_norm=None)
    )
    with pytest.raises(UserError) as refusal:
        train(config)
    message = one_line(refusal)
    assert "lower optimizer.learning_rate or a smaller optimizer.clip_norm" in message
    assert re.search(r" at step \d, on the samples train-\S+, train-\S+; ", message), message
    assert all(np.isfinite(line["loss"]) for line in metrics(config))
    kept = [path.name for path in (config.run_dir / "checkpoints").iterdir()]
    assert str(STEPS) not in kept
    for step in kept:  # none is of NaNs
        assert all(np.isfinite(v).all() for v in saved(config, int(step))[0].values())


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path, monkeypatch, finished):
    config = base_config(tmp_path / "run", sample_every=4, sample_prompts=PROMPTS)
    usage, asked = shutil.disk_usage, []

    def disk_usage(path):
        asked.append(path)
        return usage(path) if len(asked) < 2 else usage(path)._replace(free=1000)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk_usage)
        with pytest.raises(UserError) as refusal:
            train(config)
    message = one_line(refusal)
    assert message.startswith("no checkpoint can be written to ")
    assert message.endswith("make room there, and resume=true goes on from step 2")
    train(dataclasses.replace(config, resume=True))
    assert_same_checkpoint(finished, config)


FULL = """
import resource, sys
import taca_jax.training.checkpoints as checkpoints
from taca_jax.config.json_text import from_json
from taca_jax.training.config import TrainConfig
from taca_jax.errors import UserError
from taca_jax.training import train

save = checkpoints.Checkpoints.save

def full(self, state, data):
    self.wait()
    if int(state.step) == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    save(self, state, data)

checkpoints.Checkpoints.save = full
try:
    train(from_json(TrainConfig, open(sys.argv[1]).read()))
except UserError as error:
    print(f"error: {error}")
    sys.exit(1)
"""


@pytest.mark.slow
def test_a_disk_that_fills_while_a_checkpoint_is_written(finished, tmp_path):
    config = base_config(tmp_path / "run")
    full = run_script(FULL, config, tmp_path)
    assert full.returncode == 1
    # On stdout, because Orbax's threads have a word about each array on stderr.
    (line,) = full.stdout.splitlines()
    assert line.startswith("error: no checkpoint can be written to ")
    assert line.endswith("(File too large); make room there, and resume=true goes on from step 2")
    train(dataclasses.replace(config, resume=True))
    assert_same_checkpoint(finished, config)


def test_a_save_that_fails_is_reported_by_the_next_call(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1, frozen=nnx.State({})) as checkpoints:

        def fail():
            raise ValueError("deep in it: No space left on device [os_error_code='28'] and more")

        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(UserError, match=r"\(No space left on device\); .* resume=true begins"):
            checkpoints.wait()
        monkeypatch.undo()


def folder_config(folder, out_dir, **changes):
    data = DataConfig(source=f"folder:{folder}", batch_size=2, resolution=40, max_bad_share=0.1)
    text = TextConfig("bytes", 16, T5Config(259, 32, 32, 2, 16, 1))
    return base_config(out_dir, **({"data": data, "text": text} | changes))


def picture(path, caption="a caption"):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text(caption)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "holds no pictures"),
        (lambda folder: folder.rmdir(), "does not exist"),
        (lambda folder: (folder / "a.png").write_bytes(b"torn"), "1 of 1 pictures cannot be used"),
    ],
)
def test_data_that_cannot_be_used_leaves_no_run_behind(tmp_path, prepare, message):
    folder = tmp_path / "pictures"
    folder.mkdir()
    prepare(folder)
    config = folder_config(folder, tmp_path / "run")
    with pytest.raises(UserError, match=message) as refusal:
        train(config)
    one_line(refusal)
    assert not (tmp_path / "run" / "config.json").exists()


def test_pictures_that_turn_out_bad_stop_the_run_in_one_line(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        picture(folder / f"{i}.png")
        (folder / f"{i}.png").write_bytes(b"torn")
    config = folder_config(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"pictures cannot be used, more than data\.max_bad_share"):
        train(config)


def test_words_that_the_tokenizer_lacks_are_named(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture(folder / "a.png", "a dog")
    text = TextConfig("shapes", 16, T5Config(33, 32, 32, 2, 16, 1))
    config = folder_config(folder, tmp_path / "run", text=text)
    with pytest.raises(UserError, match="the word 'dog' is unknown to this model") as refusal:
        train(config)
    one_line(refusal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None, "base": "nowhere", "text": TextConfig()}, "nowhere"),
        ({"autoencoder": "nowhere"}, "nowhere is not there; give an autoencoder"),
        ({"text": TextConfig("nowhere", 16, T5Config(33, 32, 32, 2, 16, 1))}, "neither shapes, by"),
        ({"text": TextConfig("shapes", 16, T5Config(33, 48, 32, 2, 16, 1))}, "encoder.dim is 48"),
        ({"model": None, "base": "nowhere"}, r"base=nowhere says how text is read; leave out text"),
        (
            {"model": None, "base": "there", "text": TextConfig(), "pixels": PixelsConfig(0.5)},
            r"base=there says how pixels are read; leave out pixels\.\*",
        ),
        (
            {"autoencoder": "there", "pixels": PixelsConfig(0.5)},
            r"autoencoder=there says what latents are; leave out pixels\.\*",
        ),
        ({"sample_every": 1, "sample_prompts": ("a dog",)}, "the word 'dog' is unknown"),
        ({"data": DataConfig("generated:shapes", 2, 41)}, "data.resolution is 41; this model take"),
        ({"data": DataConfig("generated:shapes", 2, 44)}, "shapes are drawn at 40 pixels"),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_step(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        train(base_config(tmp_path / "run", **changes))
    one_line(refusal)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_of_another_model_is_no_autoencoder(base, tmp_path):
    for part, kind in (("transformer", "FluxTransformer"), ("text_encoder", "T5Encoder")):
        config = base_config(tmp_path / "run", autoencoder=f"{base}/{part}")
        with pytest.raises(UserError, match=f"holds a {kind}; give the folder of an autoencoder"):
            train(config)


def test_the_reading_threads_end_with_the_run(tmp_path, monkeypatch):
    closed = []
    close = Loader.close
    monkeypatch.setattr(Loader, "close", lambda self: (closed.append(self), close(self)))
    train(base_config(tmp_path, steps=1))
    assert len(closed) == 1


def test_a_mesh_of_more_devices_than_there_are_is_refused(tmp_path):
    config = tiny_config(tmp_path / "run", mesh=MeshConfig(fsdp=8))
    with pytest.raises(UserError, match=r"mesh\.fsdp=8.* 8 devices.* 1"):
        train(config)
    assert not (tmp_path / "run").exists()
