"""Weights in float8, alone and times a scale, in the single files that ComfyUI users have."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from taca_jax.convert.cli import main
from taca_jax.errors import UserError
from taca_jax.families.flux import bfl
from taca_jax.families.sd3 import stability
from taca_jax.formats.float8 import cast
from taca_jax.formats.key_table import Table
from taca_jax.formats.tensor_files import FLOAT8, open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.text import t5_layout
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.original_pipelines import parts_in_file
from taca_jax.weights.originals import Original, t5, transformer
from tests.models import FLUX, SD3, T5, in_layout
from tests.random_models import random_model

SD3_TABLE = stability.table_of(SD3)
QUERY = "encoder.block.0.layer.0.SelfAttention.q"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def t5_tensors() -> Tensors:
    return in_layout(t5_layout.TABLE, random_model(T5))


def old_names(scales: dict[str, float], prefix: str) -> Tensors:
    """As in `t5xxl_fp8_e4m3fn_scaled.safetensors`: an empty tensor marks the file."""
    said = {prefix + "scaled_fp8": np.zeros(0, FLOAT8[0])}
    for layer, scale in scales.items():
        said[f"{layer}.scale_weight"] = np.array([scale], np.float32)
        said[f"{layer}.scale_input"] = np.ones(1, np.float32)
    return said


def new_names(scales: dict[str, float], prefix: str) -> Tensors:
    """As ComfyUI writes them since it mixes precisions: each layer says its format."""
    del prefix
    form = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
    return {
        f"{layer}.{name}": tensor
        for layer, scale in scales.items()
        for name, tensor in (
            ("weight_scale", np.array(scale, np.float32)),
            ("input_scale", np.ones((), np.float32)),
            ("comfy_quant", form),
        )
    }


def scaled(
    tensors: Tensors, names: Callable, prefix: str = "", dtype: np.dtype = FLOAT8[0]
) -> tuple[Tensors, Tensors]:
    """A scaled file's tensors, every matrix in float8, and the numbers that they stand for."""
    stored, meant, scales = {}, {}, {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if name.endswith(".weight") and tensor.ndim == 2:
            scale = np.float32(np.abs(tensor).max() / 400 * (1 + number % 3))
            stored[prefix + name] = (tensor / scale).astype(dtype)
            meant[name] = stored[prefix + name].astype(np.float32) * scale
            scales[prefix + name.removesuffix(".weight")] = scale
        else:
            stored[prefix + name] = meant[name] = tensor
    return stored | names(scales, prefix), meant


def loaded(source: Original) -> Tensors:
    return in_layout(source.table, source.load(LoadOptions(jnp.float32, param_dtype=jnp.float32)))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_is_read_and_cast(tmp_path, dtype):
    every = np.arange(256, dtype=np.uint8).view(dtype).reshape(4, 8, 8)
    write_tensors(tmp_path / "f8.safetensors", {"b": every[:2], "a": every[2:], "c": every[0, :0]})
    tensors = open_tensors(tmp_path / "f8.safetensors")
    assert tensors.dtypes["a"] == dtype
    read = np.concatenate([tensors.read("b"), tensors.read("a")])
    assert read.dtype == dtype
    np.testing.assert_array_equal(read.view(np.uint8), every.view(np.uint8))
    part = tensors.read("a", slice(1, 2))
    np.testing.assert_array_equal(part.view(np.uint8), every[3:].view(np.uint8))
    assert tensors.read("c").shape == (0, 8)
    wide = every.astype(np.float32)
    for target in (np.float32, ml_dtypes.bfloat16):
        assert cast(every, target).dtype == target
        np.testing.assert_array_equal(cast(every.transpose(2, 0, 1), target).astype(np.float32),
                                      wide.transpose(2, 0, 1))  # fmt: skip


def test_float8_models(tmp_path, t5_tensors):
    """t5xxl_fp8_e4m3fn.safetensors: matrices in float8, some files' norms in another type."""
    stored = {
        name: tensor.astype(np.float16 if "layer_norm" in name else FLOAT8["wo" in name])
        for name, tensor in t5_tensors.items()
    }
    write_tensors(tmp_path / "t5.safetensors", stored)
    main(["t5", "--src", str(tmp_path / "t5.safetensors"), "--dst", str(tmp_path / "dst")])
    again = load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32))
    kinds = {path: str(param.dtype) for path, param in flat_params(again).items()}
    assert set(kinds.values()) == {"bfloat16", "float16"}
    assert kinds["final_norm.scale"] == "float16"
    exported = in_layout(t5_layout.TABLE, again)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(exported[name].astype(np.float32), tensor.astype(np.float32))


@pytest.mark.parametrize("names", [old_names, new_names])
@pytest.mark.parametrize(
    ("config", "table", "read", "prefix"),
    [
        (FLUX, bfl.TABLE, partial(transformer, axes_dim=FLUX.axes_dim), bfl.COMFY_PREFIX),
        (SD3, SD3_TABLE, transformer, stability.PREFIX),
        (T5, t5_layout.TABLE, t5, ""),
    ],
)
def test_scaled_models(tmp_path, config, table: Table, read: Callable, prefix, names):
    stored, meant = scaled(in_layout(table, random_model(config)), names, prefix)
    file = tmp_path / "x.safetensors"
    write_tensors(file, stored)
    source = read(file)
    assert source.left_out == ()
    for name, tensor in loaded(source).items():
        np.testing.assert_array_equal(tensor, meant[name], err_msg=name)


def test_a_scaled_file_from_end_to_end(tmp_path, t5_tensors, capsys):
    """e5m2, stored as bfloat16; one of its matrices has no scale."""
    stored, meant = scaled(t5_tensors, old_names, dtype=FLOAT8[1])
    del stored[f"{QUERY}.scale_weight"]
    meant[f"{QUERY}.weight"] = stored[f"{QUERY}.weight"].astype(np.float32)
    file, dst = tmp_path / "t5.safetensors", tmp_path / "dst"
    write_tensors(file, stored)
    main(["inspect", str(file)])
    assert "MB of float32, float8_e5m2, times 15 scales" in capsys.readouterr().out
    main(["t5", "--src", str(file), "--dst", str(dst)])
    again = in_layout(t5_layout.TABLE, load_model(dst, LoadOptions(dtype=jnp.float32)))
    for name, tensor in again.items():
        assert tensor.dtype == (np.float32 if "layer_norm" in name else ml_dtypes.bfloat16)
        np.testing.assert_array_equal(tensor, meant[name].astype(tensor.dtype), err_msg=name)
    main(["verify", "--src", str(file), "--dst", str(dst)])
    assert "21 tensors: 6 equal, 15 rounded" in capsys.readouterr().out


def test_a_scaled_text_encoder_within_a_checkpoint(tmp_path, t5_tensors):
    """Its scales are neither left out nor taken for the transformer's."""
    prefix = "text_encoders.t5xxl.transformer."
    stored, meant = scaled(t5_tensors, old_names, prefix)
    others, _ = scaled(in_layout(SD3_TABLE, random_model(SD3)), old_names, stability.PREFIX)
    file = tmp_path / "x.safetensors"
    write_tensors(file, stored | others | {"model_ema.decay": np.zeros(1)})
    parts = parts_in_file(file)
    assert parts["transformer"].left_out == ("model_ema.decay",)
    for name, tensor in loaded(parts["text_encoder_3"]).items():
        np.testing.assert_array_equal(tensor, meant[name], err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{QUERY}.weight_scale": np.ones((16, 1), np.float32)}, r"is \(16, 1\) instead of one"),
        ({"lost.scale_weight": np.ones(1, np.float32)}, "scales lost.weight, which is not there"),
        ({f"{QUERY}.scale_weight": np.full(1, np.nan, np.float32)}, "are no numbers: .*q.weight"),
        ({f"{QUERY}.comfy_quant": b'{"format": "nvfp4"}'}, "q is nvfp4"),
        ({f"{QUERY}.comfy_quant": b"[" * 9}, "does not say readably"),
        ({f"{QUERY}.weight": np.ones((8, 8), np.uint8)}, "1 of integers, .* is uint8"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, t5_tensors, change, message):
    stored, _ = scaled(t5_tensors, old_names)
    for name, value in change.items():
        stored[name] = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
    file = tmp_path / "x.safetensors"
    write_tensors(file, stored)
    with pytest.raises(UserError, match=message) as refused:
        loaded(t5(file))
    assert "\n" not in str(refused.value)


def test_a_truncated_file_is_refused(tmp_path: Path):
    file = tmp_path / "f8.safetensors"
    write_tensors(file, {"a": np.zeros((4, 4), FLOAT8[0])})
    tensors = open_tensors(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="truncated or damaged"):
        open_tensors(file)
    with pytest.raises(UserError, match="truncated or damaged"):
        tensors.read("a")
