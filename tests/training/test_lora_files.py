"""The LoRA files of a run: those that it leaves at its checkpoints, and the one it starts from."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.formats.tensor_files import open_tensors
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora, linears
from taca_jax.taca import TacaConfig
from taca_jax.training.models import open_models
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.run import train
from taca_jax.weights.lora_files import load_adapter, write_lora
from tests.convert.commands import refused, run
from tests.random_models import randomise
from tests.training.tiny import lora_changes, tiny_config, tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_pipeline().save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A LoRA of rank 3, whose strength is not 1."""
    model = tiny_pipeline().transformer
    add_lora(model, LoRAConfig(rank=3, alpha=6), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    randomise(model, LoRAParam, scale=0.2)
    file = tmp_path_factory.mktemp("start") / "lora.safetensors"
    write_lora(file, model)
    return str(file)


def config_for(base, out_dir, **changes):
    return tiny_config(out_dir, **(lora_changes(base) | changes))


def tensors_in(file):
    tensors = open_tensors(file)
    return {name: tensors.read(name) for name in tensors.shapes}


@pytest.mark.parametrize(("taca", "gate"), [(TacaConfig(threshold=800), "taca"), (None, "always")])
def test_each_checkpoint_has_its_lora_as_a_file(base, tmp_path, taca, gate):
    config = config_for(base, tmp_path / "run", taca=taca, save_every=1, keep_checkpoints=2)
    train(config)
    folder = config.run_dir / "loras"
    names = ["step-000003.safetensors", "step-000004.safetensors"]
    assert sorted(file.name for file in folder.iterdir()) == names
    before, last = (tensors_in(folder / name) for name in names)
    final = tensors_in(config.run_dir / "lora.safetensors")
    assert before.keys() == last.keys() == final.keys()
    assert all(np.array_equal(last[name], final[name]) for name in final)
    assert any(not np.array_equal(last[name], before[name]) for name in final)
    for file in (folder / names[0], config.run_dir / "lora.safetensors"):
        assert load_adapter(file).gate == gate


def test_a_warm_up_that_is_cut_is_said(base, tmp_path, capsys):
    optimizer = OptimizerConfig(warmup_steps=100, schedule="linear")
    train(config_for(base, tmp_path, steps=1, optimizer=optimizer))
    assert "optimizer.warmup_steps=100 is cut to steps=1" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "alpha"), [(3, 3.0), (5, 10.0)])
def test_a_run_starts_from_a_lora(base, start, tmp_path, rank, alpha):
    """In as many ranks as it has; what further ones may learn begins at nothing."""
    config = config_for(base, tmp_path, lora=LoRAConfig(rank=rank, alpha=alpha, init=start))
    adapter = load_adapter(Path(start)).adapter
    compared = 0
    for path, layer in linears(open_models(config).load_transformer()):
        if layer.lora_a is None:
            continue
        assert layer.lora_a.shape[-1] == rank
        found = layer.lora_a.get_value() @ layer.lora_b.get_value() * layer.lora_alpha_over_rank
        for index, delta in enumerate(np.asarray(found)):
            factors = adapter[path, index]
            expected = factors.a @ factors.b * factors.strength
            np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)
            compared += 1
        if rank > 3:
            assert np.abs(np.asarray(layer.lora_a.get_value())[..., 3:]).max() > 0
    assert compared == len(adapter)
    train(config)
    trained = load_adapter(tmp_path / "lora.safetensors").adapter
    assert trained.keys() == adapter.keys()


def test_a_start_that_does_not_fit_is_refused_before_anything_loads(base, start, tmp_path):
    for lora, message in (
        (LoRAConfig(init="no.safetensors"), r"no\.safetensors is not there"),
        (LoRAConfig(rank=2, init=start), r"is of rank 3, and lora\.rank is 2; set lora\.rank=3"),
        (LoRAConfig(targets=(r"single.*",), init=start), r"double_blocks\..* are no targets of"),
        (LoRAConfig(init="shapes_taca.safetensors"), "is a LoRA of another model"),
    ):
        with pytest.raises(UserError, match=message):
            open_models(config_for(base, tmp_path, lora=lora))


def test_a_run_goes_on_without_the_lora_that_it_started_from(base, start, tmp_path):
    moved = tmp_path / "start.safetensors"
    shutil.copy(start, moved)
    lora = LoRAConfig(rank=3, init=str(moved))
    config = config_for(base, tmp_path / "run", lora=lora, steps=2)
    train(config)
    moved.unlink()
    train(dataclasses.replace(config, resume=True, steps=3))
    train(dataclasses.replace(config, resume=True, steps=4, lora=LoRAConfig(rank=3)))
    assert (tmp_path / "run" / "loras" / "step-000004.safetensors").is_file()


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_lora_of_any_checkpoint_is_exported(base, tmp_path, capsys, ema_decay):
    """The file is the very one that training wrote at that step."""
    optimizer = OptimizerConfig(learning_rate=1e-2, ema_decay=ema_decay)
    run_dir = tmp_path / "run"
    train(config_for(base, run_dir, optimizer=optimizer))
    export = ("export", "--src", run_dir, "--dst")
    run(*export, tmp_path / "new.safetensors")
    run(*export, tmp_path / "old.safetensors", "--step", 2)
    assert "of step 2 of" in capsys.readouterr().out
    for name, step in (("new", 4), ("old", 2)):
        file = run_dir / "loras" / f"step-{step:06d}.safetensors"
        assert (tmp_path / f"{name}.safetensors").read_bytes() == file.read_bytes()
    assert load_adapter(tmp_path / "old.safetensors").gate == "taca"
    run(*export, tmp_path / "kohya.safetensors", "--to", "kohya")
    assert load_adapter(tmp_path / "kohya.safetensors").dialect.startswith("kohya")
    for words, message in (
        ((tmp_path / "x.safetensors", "--step", 3), "has checkpoints of steps 2, 4, not 3"),
        ((tmp_path / "x.safetensors", "--to", "original"), "--to original is for models; a run's"),
        ((tmp_path / "old.safetensors",), "exists; give a new name or remove it"),
    ):
        assert message in refused(capsys, *export, *words)
    assert "--step is for a training run" in refused(
        capsys, "export", "--src", base, "--dst", tmp_path / "y", "--step", 2
    )
