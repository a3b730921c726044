"""The TPU kernel in interpret mode: exact in any shape, size and block, forward and backward.

That it compiles for TPUs, and what it costs there, is tests/tpu's.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from taca_jax.attention import reference
from taca_jax.attention.pallas_tpu import Blocks, BlockSizes, joint_attention

SMALL = BlockSizes(Blocks(128, 32), Blocks(128, 32))
LOOPED = BlockSizes(Blocks(128, 16, per_step=2, unroll=2), Blocks(128, 16, per_step=2, unroll=2))
TRANSPOSED = BlockSizes(
    Blocks(128, 128, per_step=3, prefetch=3),
    Blocks(128, 128, per_step=3, prefetch=2, transposed=True),
)
TRANSPOSED_LOOP = BlockSizes(
    Blocks(128, 128, unroll=1), Blocks(128, 128, unroll=1, transposed=True)
)


def definition(q, k, v, text_len, gamma, d_out, *, absolute=False) -> list[np.ndarray]:
    """The output and the gradients of q, k, v and gamma, in float64, term by term.

    With `absolute`, sums of the gradients' terms without their signs: where a softmax is nearly one
    key, terms cancel, and rounding is to be measured against what they were.
    """
    q, k, v, d_out, gamma = (np.asarray(x, np.float64) for x in (q, k, v, d_out, gamma))
    size = np.sqrt(q.shape[-1])
    length = q.shape[1]
    image_to_text = (np.arange(length) >= text_len)[:, None] & (np.arange(length) < text_len)
    factor = np.where(image_to_text, gamma[:, None, None, None], 1.0)
    plain = np.einsum("bqhd,bkhd->bhqk", q, k) / size
    logits = plain * factor
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    if absolute:
        q, k, v, d_out, plain = (abs(x) for x in (q, k, v, d_out, plain))
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, v)
    mean = (weights * d_weights).sum(-1, keepdims=True)
    d_logits = weights * (d_weights + mean if absolute else d_weights - mean)
    d_plain = d_logits * factor / size
    return [
        out,
        np.einsum("bhqk,bkhd->bqhd", d_plain, k),
        np.einsum("bhqk,bqhd->bkhd", d_plain, q),
        np.einsum("bhqk,bqhd->bkhd", weights, d_out),
        (d_logits * plain * image_to_text).sum((1, 2, 3)),
    ]


def draw(batch, length, heads, head_dim, dtype, seed=0, size=1.0):
    """q, k, v, gamma per sample, and the gradient of the output; logits are about `size`."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shape = (batch, length, heads, head_dim)
    q, k, v, d_out = (jax.random.normal(key, shape).astype(dtype) for key in keys[:4])
    return (q * size).astype(dtype), k, v, jax.random.uniform(keys[4], (batch,)) + 1, d_out


@partial(jax.jit, static_argnames=("attend",))
def output_and_gradients(attend, q, k, v, gamma, d_out):
    out, pull = jax.vjp(attend, q, k, v, gamma)
    return [out, *pull(d_out)]


def kernel(text_len, blocks):
    return lambda q, k, v, gamma: joint_attention(
        q, k, v, text_len=text_len, gamma=gamma, blocks=blocks, interpret=True
    )


def errors(ours, exact, size=None) -> np.ndarray:
    """||a - b|| / ||size|| of each, `size` the exact values unless given; of zeros, ||a||."""
    size = exact if size is None else size
    return np.array(
        [
            np.linalg.norm(np.asarray(a, np.float64) - b) / (np.linalg.norm(s) or 1.0)
            for a, b, s in zip(ours, exact, size, strict=True)
        ]
    )


GENERATE = (Phase.explicit, Phase.generate)
"""Each example compiles: shrinking a failure would take minutes."""


def recomputed(q, k) -> float:
    """The relative error of a weight whose logit is right to some last bits of float32."""
    largest = np.abs(np.einsum("bqhd,bkhd->bhqk", q, k)).max() / np.sqrt(q.shape[-1])
    return 4 * np.finfo(np.float32).eps * 2 * largest  # 2: a gamma of up to 2


shapes = st.tuples(
    st.integers(1, 2),  # samples
    st.integers(0, 90),  # text
    st.integers(0, 170),  # image
    st.sampled_from([(2, 64), (3, 64), (1, 128), (2, 128), (4, 32), (3, 40), (1, 256)]),
    st.sampled_from([SMALL, LOOPED, TRANSPOSED, TRANSPOSED_LOOP, None]),
).filter(lambda s: s[1] + s[2] > 1)


@settings(max_examples=8, phases=GENERATE)
@given(shape=shapes, seed=st.integers(0, 9))
def test_float32_is_exact(shape, seed):
    batch, text_len, image, (heads, head_dim), blocks = shape
    inputs = draw(batch, text_len + image, heads, head_dim, jnp.float32, seed)
    q, k, v, gamma, d_out = inputs
    ours = output_and_gradients(kernel(text_len, blocks), *inputs)
    exact = definition(q, k, v, text_len, gamma, d_out)
    found = errors(ours, exact)
    assert found[:4].max() < 1e-5, found
    # Gamma's gradient is one sum over everything: its rounding is measured against its terms.
    terms = definition(q, k, v, text_len, gamma, d_out, absolute=True)
    assert errors(ours[4:], exact[4:], terms[4:])[0] < 1e-5


@settings(max_examples=4, phases=GENERATE)
@given(shape=shapes, size=st.sampled_from([30.0, 1e3, 1e4]))
def test_large_logits_are_as_right_as_float32_can_be(shape, size):
    """A logit of 1e4 is right to 1e-3 in float32, whoever computes it. The output is asked to be
    no further off than the reference's, which has every number at once; the gradients no further
    than weights of recomputed logits must be."""
    batch, text_len, image, (heads, head_dim), blocks = shape
    inputs = draw(batch, text_len + image, heads, head_dim, jnp.float32, size=size)
    q, k, v, gamma, d_out = inputs
    exact = definition(q, k, v, text_len, gamma, d_out)
    terms = definition(q, k, v, text_len, gamma, d_out, absolute=True)
    ours = output_and_gradients(kernel(text_len, blocks), *inputs)
    theirs = reference.joint_attention(q, k, v, text_len=text_len, gamma=gamma)
    allowed = max(1e-5, 3 * errors([theirs], exact[:1])[0])
    assert errors(ours[:1], exact[:1])[0] <= allowed
    assert errors(ours[1:4], exact[1:4], terms[1:4]).max() <= 1e-5 + recomputed(q, k)


@settings(max_examples=4, phases=GENERATE)
@given(shape=shapes)
def test_bfloat16_is_no_worse_than_plain_bfloat16(shape):
    """Than attention written out with bfloat16 products and a float32 softmax."""
    batch, text_len, image, (heads, head_dim), blocks = shape
    inputs = draw(batch, text_len + image, heads, head_dim, jnp.bfloat16)
    q, k, v, gamma, d_out = inputs
    exact = definition(q, k, v, text_len, gamma, d_out)

    def plain(q, k, v, gamma):
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * head_dim**-0.5
        is_text = jnp.arange(q.shape[1]) < text_len
        scaled = ~is_text[:, None] & is_text
        weights = jax.nn.softmax(logits * jnp.where(scaled, gamma[:, None, None, None], 1.0))
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(q.dtype), v)

    ours, theirs = (
        errors(output_and_gradients(attend, *inputs)[:4], exact[:4])
        for attend in (kernel(text_len, blocks), plain)
    )
    # Gradients that vanish but for rounding are compared to nothing.
    assert np.all(ours <= np.maximum(1e-3, 1.5 * theirs)), (ours, theirs)


@pytest.mark.parametrize("blocks", [SMALL, LOOPED, TRANSPOSED])
@pytest.mark.parametrize("where", [0, 60, 140, 199])
def test_one_huge_key_wins_wherever_it_is(where, blocks):
    """Beyond the first tile its exponential overflows: the block is done again, online."""
    q, k, v, gamma, d_out = draw(1, 200, 2, 64, jnp.float32)
    q, k = jnp.abs(q), k.at[:, where].set(1e3)
    inputs = (q, k, v, gamma, d_out)
    assert float((q[0, :, 0] @ k[0, where, 0]).min()) / 8 > 2000
    ours = output_and_gradients(kernel(50, blocks), *inputs)
    exact = definition(q, k, v, 50, gamma, d_out)
    assert all(bool(jnp.isfinite(x).all()) for x in ours)
    assert errors(ours[:1], exact[:1])[0] < 1e-5
    # The backward pass computes the logit again: what it may differ by, its weight is off by.
    assert errors(ours[3:4], exact[3:4])[0] < recomputed(q, k)


def test_very_low_first_tiles_lose_nothing():
    """Everything in the first tile lies 2^90 below the rest: above the limit nothing is redone."""
    q, k, v, gamma, d_out = draw(1, 160, 2, 64, jnp.float32)
    q, k = jnp.abs(q), k.at[:, :32].add(-9.0)
    ours = output_and_gradients(kernel(0, SMALL), q, k, v, gamma, d_out)
    assert errors(ours[:4], definition(q, k, v, 0, gamma, d_out)[:4]).max() < 1e-5


def test_equal_logits_average():
    q, k, v, gamma, _ = draw(1, 70, 2, 64, jnp.float32)
    out = kernel(20, SMALL)(jnp.zeros_like(q), k, v, gamma)
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)


def test_queries_may_be_a_part_of_the_sequence():
    """What one device of several computes: gamma goes by the place in the whole."""
    q, k, v, gamma, _ = draw(2, 150, 2, 64, jnp.float32)
    call = partial(joint_attention, text_len=60, gamma=gamma, blocks=SMALL, interpret=True)
    parts = [call(q[:, i : i + 50], k, v, first_query=i) for i in (0, 50, 100)]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), call(q, k, v), atol=1e-6)


def kernels(jaxpr) -> list:
    """Every pallas_call in a jaxpr, inner ones included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += kernels(inner)
    return found


@pytest.mark.parametrize(("arguments", "outputs"), [((0, 1, 2), 3), ((0, 3), 4)])
def test_gammas_gradient_is_computed_only_where_asked_for(arguments, outputs):
    *inputs, d_out = draw(1, 40, 2, 64, jnp.float32)

    def loss(*inputs):
        return jnp.vdot(kernel(10, SMALL)(*inputs), d_out)

    forward, backward = kernels(jax.make_jaxpr(jax.grad(loss, arguments))(*inputs).jaxpr)
    assert len(forward.outvars) == 3  # the output and its softmax's sums
    assert len(backward.outvars) == outputs


def test_a_schedule_runs_in_one_compiled_kernel():
    q, k, v, _, _ = draw(1, 40, 2, 64, jnp.float32)
    call = jax.jit(kernel(10, SMALL))
    for gamma in (1.0, 1.1, 1.2):
        call(q, k, v, jnp.array([gamma]))
    assert call._cache_size() == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"queries": 100, "keys": 32}, r"blocks.queries is 100; it must be a multiple of 128"),
        ({"queries": 128, "keys": 40}, r"blocks.keys is 40; it must be a multiple of 16"),
        ({"queries": 128, "keys": 32, "prefetch": 0}, r"blocks.prefetch is 0"),
        ({"queries": 128, "keys": 32, "per_step": 0}, r"blocks.per_step is 0"),
    ],
)
def test_blocks_that_no_kernel_has(sizes, message):
    with pytest.raises(ValueError, match=message):
        Blocks(**sizes)
