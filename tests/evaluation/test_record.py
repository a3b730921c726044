"""The record of results: what may change, and what is named if it must not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.evaluation.attention_maps.config import AttentionConfig
from taca_jax.evaluation.record import RECORD, check_record, model_files, write_record
from taca_jax.evaluation.shapes.config import ShapesConfig
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.taca import TacaConfig
from taca_jax.weights.lora_files import GATE


def write_factors(file: Path, value: float) -> None:
    """A LoRA that acts with TACA, as far as the record reads it."""
    write_tensors(file, {"a": np.full(1, value, np.float32)}, {GATE: "taca"})


@pytest.fixture
def config(tmp_path):
    """A configuration whose base and LoRA are there, and whose record is in its folder."""
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True)
    (base / "transformer" / "model.safetensors").write_bytes(b"weights")
    write_factors(tmp_path / "lora.safetensors", 1)
    config = ShapesConfig(
        base=str(base), lora=str(tmp_path / "lora.safetensors"), out=str(tmp_path / "out")
    )
    write_record(tmp_path / "out", config, model_files(config))
    return config


def refused(out, config, **options) -> str:
    with pytest.raises(UserError) as error:
        check_record(out, config, model_files(config), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_difference_is_named(tmp_path, config):
    out = tmp_path / "out"
    check_record(out, config, model_files(config))
    changed = replace(config, seed=3, taca=TacaConfig(gamma=1.3), guidances=(1.0, 2.0))
    said = refused(out, changed)
    for difference in ("taca.gamma is 1.2 there, 1.3 here", "seed is 0 there, 3 here"):
        assert difference in said
    assert "guidances is empty there, 1.0,2.0 here; name another out, or remove it" in said
    assert "seed" not in refused(out, changed, free=("seed",))
    check_record(out, changed, model_files(changed), free=("seed", "taca", "guidances"))


def test_changed_weights_are_named_and_moved_ones_are_the_same(tmp_path, config):
    out = shutil.move(tmp_path / "out", tmp_path / "moved out")
    base, lora = tmp_path / "base", tmp_path / "lora.safetensors"
    moved = replace(
        config,
        base=str(shutil.copytree(base, tmp_path / "moved base")),
        lora=str(shutil.copy(lora, tmp_path / "moved.safetensors")),
        out=str(out),
    )
    check_record(out, moved, model_files(moved))
    write_factors(lora, 2)
    assert f"{lora} has changed since" in refused(out, config)
    weights = base / "transformer" / "model.safetensors"
    weights.write_bytes(b"WEIGHTS")
    write_factors(tmp_path / "moved.safetensors", 2)
    said = refused(out, replace(config, lora=moved.lora))
    assert f"{weights} has changed since" in said
    assert f"lora is {lora} there, {moved.lora} here" in said
    assert f"lora is {lora} there, none here" in refused(out, replace(moved, lora=None))


def test_a_lora_that_taca_turns_off_is_not_part_of_it(config):
    without = replace(config, taca=None)
    said = refused(Path(config.out), without)
    assert "taca is set there, none here, lora is used there alone; name" in said
    # Gated like this, the file is not even looked at.
    without = replace(without, lora=f"{config.lora}@taca")
    write_record(Path(config.out), without, model_files(without))
    Path(config.lora).unlink()
    check_record(Path(config.out), without, model_files(without))


def test_strengths_and_gates_are_part_of_it(tmp_path, config):
    out, own = tmp_path / "out", config.lora
    check_record(out, replace(config, lora=f"{own}@taca:1.0"), model_files(config))
    for other in (f"{own}:0.8", f"{own}@always", f"{own}@always:0.5"):
        said = refused(out, replace(config, lora=other))
        assert f"lora is {own} there, {other} here" in said


def test_of_several_loras_the_one_that_changed_is_named(tmp_path, config):
    style = tmp_path / "style.safetensors"
    write_factors(style, 3)
    config = replace(config, lora=f"{config.lora}:0.5,{style}@always", out=str(tmp_path / "two"))
    write_record(tmp_path / "two", config, model_files(config))
    check_record(tmp_path / "two", config, model_files(config))
    plain = replace(config, taca=None)
    assert [lora.path for lora in model_files(plain)["lora"]] == [str(style)]
    write_factors(style, 4)
    assert f" {style} has changed since; name another out" in refused(tmp_path / "two", config)


def test_the_files_of_a_model(config):
    assert list(model_files(config)) == ["base", "lora"]
    assert list(model_files(replace(config, taca=None))) == ["base"]
    assert list(model_files(replace(config, lora=None))) == ["base"]


def test_other_folders_are_left_alone(tmp_path, config):
    out = tmp_path / "out"
    other = AttentionConfig(base=config.base, lora=config.lora)
    assert "is not the record of such results" in refused(out, other)
    for damaged in ("{", "[]", json.dumps({"config": {}}), json.dumps({"steps": 1000})):
        (out / RECORD).write_text(damaged)
        assert "is not the record of such results" in refused(out, config)
    assert "base holds something else; name another out" in refused(tmp_path / "base", config)
    file = tmp_path / "lora.safetensors"
    assert f"cannot be written to: {file} is a file" in refused(file, config)
    assert f"cannot be written to: {file} is a file" in refused(file / "within", config)


def test_new_and_empty_folders_and_a_killed_writers_are_free(tmp_path, config):
    empty = tmp_path / "empty"
    (empty / f".{RECORD}.abc.partial").mkdir(parents=True)
    for out in (empty, tmp_path / "new" / "one"):
        check_record(out, config, model_files(config))
    assert not (tmp_path / "new").exists()
