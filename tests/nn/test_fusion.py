"""Barriers for the TPU's compiler: where they stand, and that they change no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.nn import fusion, layers

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
    def plain(x):
        return jax.nn.gelu(x, approximate=True)

    del kind
    np.testing.assert_array_equal(layers.gelu(X), plain(X))
    ours, theirs = (
        jax.grad(lambda x, gelu=gelu: (gelu(x) ** 2).sum())(X) for gelu in (layers.gelu, plain)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
