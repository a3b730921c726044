"""Barriers for the TPU's compiler: where they stand, and that they change no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.nn import fusion, layers
from taca_jax.nn.lora import attach
from taca_jax.parallel.chips import CHIPS

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8), np.float32))


@pytest.fixture(params=["cpu", "TPU v6 lite"])
def kind(request, monkeypatch):
    monkeypatch.setattr(fusion, "device_kind", lambda: request.param)
    return request.param


def barriers(function):
    return str(jax.make_jaxpr(function)(X)).count("optimization_barrier")


def test_a_barrier_is_in_one_direction_alone_and_on_tpus_alone(kind):
    on_tpu = int(kind.startswith("TPU"))
    assert barriers(lambda x: fusion.written_once(x)) == on_tpu
    assert barriers(lambda x: fusion.gradient_written_once(x)) == 0
    for function in (fusion.written_once, fusion.gradient_written_once):
        gradient = jax.grad(lambda x, function=function: jnp.sin(function(x)).sum())
        assert barriers(gradient) == on_tpu


def test_values_and_gradients_are_those_without(kind):
    """Of an MLP, and of its LoRA, which makes what it reads itself."""
    options = {"param_dtype": jnp.float32, "dtype": jnp.float32, "bias": False}
    layer = layers.Linear(8, 4, rngs=nnx.Rngs(0), **options)
    a, b = np.random.default_rng(1).standard_normal((2, 8, 2)).astype(np.float32)
    attach(layer, jnp.asarray(a), jnp.asarray(b[:4].T), 1.0)
    strength = jnp.array([0.5, 1.0])
    graph, state = nnx.split(layer)

    def ours(state, x):
        return nnx.merge(graph, state)(layers.gelu(x), strength)

    def plain(state, x):
        layer, y = nnx.merge(graph, state), jax.nn.gelu(x, approximate=True)
        own = (y @ layer.lora_a[...] * strength[:, None]) @ layer.lora_b[...]
        return y @ layer.kernel[...] + own

    def gradients(function):
        return jax.grad(lambda *given: (function(*given) ** 2).sum(), (0, 1))(state, X)

    np.testing.assert_allclose(ours(state, X), plain(state, X), rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, map(gradients, (ours, plain))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    on_tpu = int(kind.startswith("TPU"))
    assert barriers(lambda x: ours(state, x)) == on_tpu  # the kernel's product alone is told


VMEM = "xla_tpu_scoped_vmem_limit_kib"


@pytest.mark.parametrize("chip", [None, *CHIPS.values()], ids=["none", *CHIPS])
@pytest.mark.parametrize("jax_version", [(0, 10, 2), (0, 12, 0)])
def test_a_step_is_compiled_for_what_the_chip_has(chip, jax_version, monkeypatch):
    monkeypatch.setattr(fusion, "this_chip", lambda: chip)
    monkeypatch.setattr(fusion.jax, "__version_info__", jax_version)
    room = chip and chip.operation_vmem
    options = dict(fusion.step_options())
    assert options.pop(VMEM, None) == (str(room // 1024) if room else None)
    by_others = chip is not None and chip.gathers == "SparseCores" and jax_version >= (0, 12)
    assert [*options.values()] == (["true", "true"] if by_others else [])
    assert all(name.endswith("all_gather") for name in options)
    assert fusion.gathers_meanwhile(chip) == (by_others or (chip and chip.name == "v5e") or False)


def test_what_libtpu_was_told_is_left_to_it(monkeypatch):
    monkeypatch.setattr(fusion, "this_chip", lambda: CHIPS["v6e"])
    assert VMEM in fusion.step_options()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{VMEM}=16384")
    assert VMEM not in fusion.step_options()


@pytest.mark.parametrize("kind", ["cpu", "TPU v5 lite"])
def test_the_last_axis_lies_together_on_tpus(kind, monkeypatch):
    monkeypatch.setattr(fusion, "device_kind", lambda: kind)
    text = str(jax.make_jaxpr(lambda x: fusion.channels_together(x) * 2)(X))
    assert ("layout_constraint" in text) == kind.startswith("TPU")
