"""Norm and rotation of queries and keys: the kernel against plain JAX, in values and gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.nn.layers import RMSNorm
from taca_jax.nn.norm_rotate import norm_rotate
from taca_jax.nn.rope import joint_rotation
from tests.processes import last_line, run_python

EPSILON = 1e-6


def norms_of(head_dim: int, count: int, dtype=jnp.float32) -> list[RMSNorm]:
    found = []
    for seed in range(count):
        norm = RMSNorm(head_dim, rngs=nnx.Rngs(0), param_dtype=dtype, epsilon=EPSILON)
        scale = 1 + 0.5 * jax.random.normal(jax.random.key(seed), (head_dim,))
        norm.scale.set_value(scale.astype(dtype))
        found.append(norm)
    return found


def parts_of(lengths: tuple[int, ...], heads: int, head_dim: int, dtype=jnp.float32) -> list:
    keys = jax.random.split(jax.random.key(7), len(lengths))
    return [
        2 * jax.random.normal(key, (2, length, heads, head_dim), dtype)
        for key, length in zip(keys, lengths, strict=True)
    ]


def rotation_of(text: int, image: int, head_dim: int):
    axes = (head_dim // 2, head_dim // 4, head_dim // 4)
    return joint_rotation(text, 1, image, axes_dim=axes, theta=10_000)


CASES = {
    "single": ((96,), 3, 128, True),
    "joined in place": ((64, 96), 2, 128, True),
    "joined by a copy": ((13, 40), 2, 128, True),
    "small heads": ((32, 48), 4, 64, True),
    "large heads": ((16, 32), 1, 256, True),
    "no rotation": ((32, 48), 4, 64, False),
    "longer than a block": ((256, 300), 1, 128, True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    lengths, heads, head_dim, rotated = request.param
    text = lengths[0] if len(lengths) == 2 else 0
    rotation = rotation_of(text, lengths[-1], head_dim) if rotated else None
    return parts_of(lengths, heads, head_dim), norms_of(head_dim, len(lengths)), rotation


class TestKernel:
    def test_values(self, case):
        found, expected = (
            norm_rotate(*case, implementation=way) for way in ("pallas_interpret", "reference")
        )
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)

    def test_gradients_of_tokens_and_scales(self, case):
        parts, norms, rotation = case
        graphs, scales = zip(*(nnx.split(norm) for norm in norms), strict=True)

        def loss(parts, scales, way):
            norms = [nnx.merge(*each) for each in zip(graphs, scales, strict=True)]
            out = norm_rotate(parts, norms, rotation, implementation=way)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

        found, expected = (
            jax.grad(loss, argnums=(0, 1))(parts, scales, way)
            for way in ("pallas_interpret", "reference")
        )
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            scale = np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, atol=2e-6 * scale)

    def test_bfloat16_is_rounded_as_in_plain_jax(self):
        parts = parts_of((64, 96), 2, 128, jnp.bfloat16)
        args = parts, norms_of(128, 2, jnp.bfloat16), rotation_of(64, 96, 128)
        found, expected = (
            norm_rotate(*args, implementation=way) for way in ("pallas_interpret", "reference")
        )
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected)


def test_shares_of_a_mesh_are_the_whole():
    """In a process of its own: the number of devices is decided before JAX starts."""
    done = run_python("-m", "tests.nn.sharded_norm_rotate", devices=8)
    found = json.loads(last_line(done))
    assert found.keys() == {"fsdp", "context", "mixed"}
    assert max(max(errors) for errors in found.values()) < 1e-6
