"""Parameters onto devices: a layer at a time, quantised as they come."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import TensorFiles
from taca_jax.nn.kinds import flat_params
from taca_jax.nn.quantization import encode, quantize
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.parallel.rules import parameter_sharding
from taca_jax.text.t5 import T5_KIND
from taca_jax.weights import loading
from taca_jax.weights.folders import load_model, save_model
from taca_jax.weights.loading import LoadOptions, on_devices
from tests.models import T5
from tests.random_models import random_model

WIDE = replace(T5, dim=32, ff_dim=32, head_dim=16)
"""nf4 takes 16 inputs together at least."""


def one_device_mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("at_once", [0, 2**20])
@pytest.mark.parametrize("mesh", [False, True])
def test_a_stack_is_its_layers_wherever_it_lies(monkeypatch, at_once, mesh):
    monkeypatch.setattr(loading, "AT_ONCE", at_once)
    where = SingleDeviceSharding(jax.devices()[0])
    if mesh:
        where = NamedSharding(one_device_mesh(), P(None, "fsdp", "tensor"))
    expected = np.random.default_rng(0).standard_normal((5, 4, 6)).astype(jnp.bfloat16)
    read = []

    def part(index):
        read.append(expected[index].shape)
        return expected[index]

    made = on_devices(part, expected.shape, expected.dtype, where)
    assert made.dtype == jnp.bfloat16
    assert made.sharding.is_equivalent_to(where, made.ndim)
    np.testing.assert_array_equal(made, expected)
    assert read == ([expected.shape] if at_once else [(1, 4, 6)] * 5)


@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_a_model_is_quantised_as_it_is_loaded(tmp_path, to):
    """As whole models are; what is stored in bfloat16 too, and each part where it belongs."""
    save_model(tmp_path / "m", random_model(WIDE), dtype=jnp.bfloat16)
    mesh = one_device_mesh()
    options = LoadOptions(dtype=jnp.bfloat16, quantize=to, mesh=mesh)
    ours = flat_params(load_model(tmp_path / "m", options))
    expected = load_model(tmp_path / "m", LoadOptions(dtype=jnp.bfloat16))
    quantize(expected, T5_KIND, to)
    theirs = flat_params(expected)
    assert ours.keys() == theirs.keys()
    for path, param in ours.items():
        where = parameter_sharding(T5_KIND.sharding, path, param.shape, mesh)
        assert param.get_value().sharding.is_equivalent_to(where, len(param.shape)), path
        assert param.dtype == theirs[path].dtype, path
        assert np.array_equal(param.get_value(), theirs[path].get_value()), path


def test_kernels_are_quantised_a_layer_at_a_time(tmp_path, monkeypatch):
    save_model(tmp_path / "m", random_model(WIDE))
    read = {}

    def counted(tensors, name, *part):
        made = tensors_read(tensors, name, *part)
        read.setdefault(name, []).append(made.shape)
        return made

    tensors_read = TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", counted)
    load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32, quantize="int8"))
    assert read["blocks.attn.q.kernel"] == [(1, 32, 32)] * 2
    assert read["blocks.attn_norm.scale"] == [(2, 32)]


def test_a_layer_that_is_in_no_stack_is_quantised_too():
    weights = np.random.default_rng(0).standard_normal((64, 8), np.float32)
    one = SingleDeviceSharding(jax.devices()[0])
    found = loading._quantized(
        weights.__getitem__,
        weights.shape,
        "int8",
        path="q",
        codes_sharding=one,
        scales_sharding=one,
    )
    expected = jax.jit(encode, static_argnames="to")(weights, to="int8")
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_file_that_is_cut_while_it_is_read_is_said(tmp_path, monkeypatch):
    """Quantised kernels are read after everything was checked."""
    save_model(tmp_path / "m", random_model(WIDE))
    file = tmp_path / "m" / "model.safetensors"

    def cut(*given):
        file.write_bytes(file.read_bytes()[:-4])
        return load_parameters(*given)

    load_parameters = loading.load_parameters
    monkeypatch.setattr("taca_jax.weights.folders.load_parameters", cut)
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32, quantize="int8"))
