"""Arrays onto devices a layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from taca_jax.weights.placing import StreamedArray, put

from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.weights import placing as streams


@pytest.mark.parametrize("at_once", [0, 2**20])
@pytest.mark.parametrize("mesh", [False, True])
def test_a_stack_is_its_layers_wherever_it_lies(monkeypatch, at_once, mesh):
    monkeypatch.setattr(streams, "AT_ONCE", at_once)
    where = SingleDeviceSharding(jax.devices()[0])
    if mesh:
        where = NamedSharding(make_mesh(MeshConfig()), P(None, "fsdp", "tensor"))
    expected = np.random.default_rng(0).standard_normal((5, 4, 6)).astype(jnp.bfloat16)
    read = []

    def pieces():
        for i, layer in enumerate(expected):
            read.append(i)
            yield (i,), layer

    made = put(StreamedArray(expected.shape, expected.dtype, pieces, stacked=True), where)
    assert made.dtype == jnp.bfloat16
    assert made.sharding.is_equivalent_to(where, made.ndim)
    np.testing.assert_array_equal(made, expected)
    assert read == [0, 1, 2, 3, 4]
    whole = StreamedArray(expected.shape, expected.dtype, lambda: iter([((), expected)]), False)
    np.testing.assert_array_equal(put(whole, where), expected)
