"""Joint attention: every implementation against the reference, and TACA's own properties."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taca_jax.attention import (
    chunked,
    joint_attention,
    joint_attention_with_log_sums,
    reference,
)

IMPLEMENTATIONS = ("reference", "split", "chunked", "pallas_interpret")
FAST = IMPLEMENTATIONS[1:]
XLA = ("split", "chunked")


def inputs(batch=2, length=13, heads=3, head_dim=8, dtype=jnp.float32, seed=0, size=1.0):
    """q, k, v, and a gamma that differs by sample."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (batch, length, heads, head_dim)
    q, k, v = ((size * jax.random.normal(key, shape)).astype(dtype) for key in keys)
    return q, k, v, jnp.linspace(1.0, 2.0, batch, dtype=jnp.float32)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def by_hand(q, k, v, text_len, gamma) -> np.ndarray:
    """The definition in float64, query by query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        logits = k[b, :, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        if i >= text_len:
            logits[:text_len] *= float(gamma[b])
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights / weights.sum() @ v[b, :, h]
    return out


@pytest.mark.parametrize("text_len", [0, 1, 5, 13])
def test_the_reference_is_the_definition(text_len):
    q, k, v, gamma = inputs()
    out = reference.joint_attention(q, k, v, text_len=text_len, gamma=gamma)
    assert relative_error(out, by_hand(q, k, v, text_len, gamma)) < 1e-6


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=10)
@given(
    sizes=st.sampled_from(
        [(1, 0, 1, 1), (2, 0, 7, 1), (1, 9, 0, 2), (2, 5, 8, 3), (3, 1, 10, 2), (2, 6, 1, 1)]
    ),
    max_scores=st.sampled_from([1, 40, 333, 640, 1600, 2**22]),
)
def test_every_implementation_agrees_with_the_definition(implementation, sizes, max_scores):
    """No text, no image, odd lengths, and chunks that do not divide them."""
    batch, text_len, image, heads = sizes
    q, k, v, gamma = inputs(batch, text_len + image, heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "MAX_SCORES", max_scores)
        call = jax.jit(partial(joint_attention, text_len=text_len, implementation=implementation))
        out = call(q, k, v, gamma=gamma)
    assert relative_error(out, by_hand(q, k, v, text_len, gamma)) < 2e-6


@pytest.mark.parametrize("max_scores", [333, 2**22])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_stays_near_the_definition(implementation, max_scores, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_SCORES", max_scores)
    q, k, v, gamma = inputs(dtype=jnp.bfloat16)
    call = jax.jit(partial(joint_attention, text_len=5, implementation=implementation))
    out = call(q, k, v, gamma=gamma)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, by_hand(q, k, v, 5, gamma)) < 1e-2


def test_auto_is_chunked_on_the_cpu():
    q, k, v, gamma = inputs()
    call = partial(joint_attention, q, k, v, text_len=5, gamma=gamma)
    np.testing.assert_array_equal(call(), call(implementation="chunked"))


@pytest.mark.parametrize("max_scores", [150, 640, 2**22])
@pytest.mark.parametrize("text_len", [0, 5, 13])
@pytest.mark.parametrize("implementation", FAST)
def test_gradients_agree_with_the_references(implementation, text_len, max_scores, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_SCORES", max_scores)
    *qkv, gamma = inputs()
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape)

    def loss(implementation, q, k, v, gamma):
        out = joint_attention(
            q, k, v, text_len=text_len, gamma=gamma, implementation=implementation
        )
        return jnp.sum(out * weight)

    ours, theirs = (
        jax.jit(jax.grad(partial(loss, name), argnums=(0, 1, 2, 3)))(*qkv, gamma)
        for name in (implementation, "reference")
    )
    for name, a, b in zip("qkv", ours, theirs, strict=False):
        assert relative_error(a, b) < 5e-6, name
    np.testing.assert_allclose(ours[3], theirs[3], rtol=1e-4, atol=1e-5)


def test_gammas_gradient_is_the_slope():
    """Against finite differences of the reference in float64."""
    q, k, v, gamma = inputs(batch=1)
    step = 1e-4
    slope = (by_hand(q, k, v, 5, gamma + step) - by_hand(q, k, v, 5, gamma - step)).sum() / 2e-4

    def total(gamma):
        return joint_attention(q, k, v, text_len=5, gamma=gamma, implementation="chunked").sum()

    np.testing.assert_allclose(jax.grad(total)(gamma)[0], slope, rtol=1e-3)


@pytest.mark.parametrize("implementation", FAST)
def test_gradients_in_bfloat16_are_finite_and_near(implementation):
    def grad(dtype):
        *qkv, gamma = inputs(dtype=dtype)

        def loss(q, k, v):
            out = joint_attention(q, k, v, text_len=5, gamma=gamma, implementation=implementation)
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)

    for a, b in zip(grad(jnp.bfloat16), grad(jnp.float32), strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative_error(a, b) < 3e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gamma_is_gamma_one_bit_for_bit(implementation, dtype):
    q, k, v, gamma = inputs(dtype=dtype)
    call = partial(joint_attention, text_len=5, implementation=implementation)
    plain, one = call(q, k, v), call(q, k, v, gamma=jnp.ones_like(gamma))
    np.testing.assert_array_equal(plain, one)


def test_gamma_one_is_plain_attention():
    q, k, v, _ = inputs()
    out = joint_attention(q, k, v, text_len=5)
    assert relative_error(out, jax.nn.dot_product_attention(q, k, v)) < 1e-6


@pytest.mark.parametrize("max_scores", [100, 2**22])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_text_queries_do_not_see_gamma(implementation, max_scores, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_SCORES", max_scores)
    q, k, v, _ = inputs()
    call = jax.jit(partial(joint_attention, text_len=5, implementation=implementation))
    low, high = (call(q, k, v, gamma=jnp.full(2, g)) for g in (1.0, 3.0))
    np.testing.assert_array_equal(low[:, :5], high[:, :5])
    assert relative_error(low[:, 5:], high[:, 5:]) > 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gamma_is_per_sample(implementation):
    q, k, v, _ = inputs(batch=3)
    call = jax.jit(partial(joint_attention, text_len=5, implementation=implementation))
    gammas = [1.0, 1.2, 2.0]
    together = call(q, k, v, gamma=jnp.array(gammas))
    for i, gamma in enumerate(gammas):
        alone = call(q[i : i + 1], k[i : i + 1], v[i : i + 1], gamma=jnp.array([gamma]))
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_larger_gamma_gives_text_more_attention(implementation):
    """With positive logits. Values of 1 on text and 0 on image make the output the mass on text."""
    call = jax.jit(partial(joint_attention, text_len=4, implementation=implementation))
    for seed in range(5):
        q, k, _, _ = inputs(seed=seed)
        v = jnp.zeros_like(q).at[:, :4].set(1.0)
        low, middle, high = (
            call(jnp.abs(q), jnp.abs(k), v, gamma=jnp.full(2, g))[:, 4:] for g in (1.0, 1.2, 2.0)
        )
        assert jnp.all(low < middle)
        assert jnp.all(middle < high)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_logits_stay_finite(implementation):
    """Logits of 1e4 and more: the exponentials must be taken relative to each query's largest."""
    q, k, v, gamma = inputs(size=200.0)
    assert jnp.abs(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).max() > 1e4

    def loss(q, k, v, gamma):
        out = joint_attention(q, k, v, text_len=5, gamma=gamma, implementation=implementation)
        return jnp.sum(out), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v, gamma)
    assert all(jnp.isfinite(x).all() for x in (out, *grads))
    assert jnp.abs(out).max() <= jnp.abs(v).max() * 1.001
    assert relative_error(out, by_hand(q, k, v, 5, gamma)) < 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gamma_is_traced(implementation):
    q, k, v, _ = inputs()
    call = jax.jit(partial(joint_attention, text_len=5, implementation=implementation))
    for gamma in (1.0, 1.2, 3.0):
        call(q, k, v, gamma=jnp.full(2, gamma))
    assert call._cache_size() == 1


def largest_array(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Elements of the largest value computed anywhere in a jaxpr, loops and branches included."""
    largest = 0
    for equation in jaxpr.eqns:
        shapes = (getattr(v.aval, "shape", ()) for v in equation.outvars)
        largest = max(largest, *(int(np.prod(shape)) for shape in shapes))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            largest = max(largest, largest_array(inner))
    return largest


@pytest.mark.parametrize("what", ["forward", "gradient"])
@pytest.mark.parametrize("implementation", XLA)
def test_the_scores_of_4608_tokens_are_never_whole(implementation, what):
    """FLUX at 1024 px: 4608 x 4608 scores in float32 would be 85 MB for each of 24 heads."""
    length, heads = 4608, 24
    shape = jax.ShapeDtypeStruct((1, length, heads, 128), jnp.float32)
    gamma = jax.ShapeDtypeStruct((1,), jnp.float32)

    def forward(q, k, v, gamma):
        return joint_attention(q, k, v, text_len=512, gamma=gamma, implementation=implementation)

    def gradient(*args):
        return jax.grad(lambda *args: forward(*args).sum(), argnums=(0, 1, 2))(*args)

    function = forward if what == "forward" else gradient
    jaxpr = jax.make_jaxpr(function)(shape, shape, shape, gamma)
    inputs_and_gradients = 4 * length * heads * 128
    assert largest_array(jaxpr.jaxpr) < max(inputs_and_gradients, length * length)
    memory = jax.jit(function).lower(shape, shape, shape, gamma).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * heads * length * length * 4


@pytest.mark.parametrize("text_len", [0, 5, 13])
@pytest.mark.parametrize("implementation", ["chunked", "pallas_interpret"])
def test_log_sums_give_the_mass_on_text(implementation, text_len, monkeypatch):
    """Values of 1 on text and 0 on image make the output the mass on text."""
    monkeypatch.setattr(chunked, "MAX_SCORES", 150)
    q, k, _, gamma = inputs()
    v = jnp.zeros_like(q).at[:, :text_len].set(1.0)
    call = partial(joint_attention_with_log_sums, text_len=text_len, implementation=implementation)
    out, sums = jax.jit(call)(q, k, v, gamma=gamma)
    np.testing.assert_allclose(sums.text_mass, out[..., 0].swapaxes(1, 2), rtol=1e-5, atol=1e-6)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    text_query = jax.nn.logsumexp(logits[:, :, :text_len], axis=-1)
    np.testing.assert_allclose(sums.whole[:, :, :text_len], text_query, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 1.3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_order_of_keys_within_a_modality_does_not_matter(implementation, gamma):
    q, k, v, _ = inputs()
    order = np.r_[np.arange(5)[::-1], 5 + np.arange(8)[::-1]]
    call = partial(
        joint_attention, text_len=5, gamma=jnp.full(2, gamma), implementation=implementation
    )
    np.testing.assert_allclose(
        call(q, k[:, order], v[:, order]), call(q, k, v), rtol=1e-5, atol=1e-6
    )


SAMPLES = 2
NATURAL_GAMMAS = {
    "a float": 1.5,
    "an int": 2,
    "a numpy scalar": np.float64(1.5),
    "a numpy array of rank 0": np.array(1.5),
    "a jax array of rank 0": jnp.array(1.5),
    "a numpy array": np.linspace(1.0, 2.0, SAMPLES),
    "a jax array in bfloat16": jnp.linspace(1.0, 2.0, SAMPLES).astype(jnp.bfloat16),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", NATURAL_GAMMAS)
def test_gamma_may_be_a_number_or_an_array(kind, implementation):
    q, k, v, _ = inputs(batch=SAMPLES)
    given = NATURAL_GAMMAS[kind]
    whole = jnp.broadcast_to(jnp.asarray(given, jnp.float32), (SAMPLES,))
    call = partial(joint_attention, q, k, v, text_len=5, implementation=implementation)
    np.testing.assert_array_equal(call(gamma=given), call(gamma=whole))


@pytest.mark.parametrize("implementation", ["chunked", "pallas_interpret"])
def test_log_sums_take_a_number_for_gamma_too(implementation):
    q, k, v, _ = inputs(batch=SAMPLES)
    call = partial(
        joint_attention_with_log_sums, q, k, v, text_len=5, implementation=implementation
    )
    jax.tree.map(np.testing.assert_array_equal, call(gamma=1.5), call(gamma=jnp.full(SAMPLES, 1.5)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_gamma_for_all_has_the_gradient_of_all(implementation):
    q, k, v, _ = inputs(batch=SAMPLES)

    def total(gamma):
        call = partial(joint_attention, text_len=5, implementation=implementation)
        return jnp.sum(call(q, k, v, gamma=gamma) * v)

    one, each = jax.grad(total)(1.5), jax.grad(total)(jnp.full(SAMPLES, 1.5))
    assert jnp.shape(one) == ()
    np.testing.assert_allclose(one, each.sum(), rtol=1e-5)


class TestErrors:
    def test_shapes_that_differ(self):
        q, k, v, _ = inputs()
        with pytest.raises(ValueError, match=r"one \[b, s, h, d\] shape; got .*12, 3, 8"):
            joint_attention(q, k[:, :-1], v, text_len=5)

    def test_a_missing_axis(self):
        q, k, v, _ = inputs()
        with pytest.raises(ValueError, match=r"\[b, s, h, d\]"):
            joint_attention(q[0], k[0], v[0], text_len=5)

    @pytest.mark.parametrize("text_len", [-1, 14])
    def test_a_text_longer_than_the_sequence(self, text_len):
        q, k, v, _ = inputs()
        with pytest.raises(ValueError, match=rf"text_len is {text_len}; the sequence has 13"):
            joint_attention(q, k, v, text_len=text_len)

    @pytest.mark.parametrize("call", [joint_attention, joint_attention_with_log_sums])
    @pytest.mark.parametrize(
        ("gamma", "got"),
        [
            (jnp.ones(3), r"\(3,\)"),
            (np.ones((2, 1)), r"\(2, 1\)"),
            ([1.0, 1.2], "a list"),
            ("1.2", "a str"),
            (1.2j, "a complex"),
        ],
    )
    def test_a_gamma_that_is_not_one_per_sample(self, call, gamma, got):
        q, k, v, _ = inputs()
        with pytest.raises(ValueError, match=rf"shape \(2,\), one per sample; got {got}"):
            call(q, k, v, text_len=5, gamma=gamma)

    def test_the_tpu_kernel_where_there_is_no_tpu(self):
        q, k, v, _ = inputs()
        with pytest.raises(ValueError, match="compiled for TPUs and this is 'cpu'; take 'auto'"):
            joint_attention(q, k, v, text_len=5, implementation="pallas")

    def test_an_unknown_implementation(self):
        q, k, v, _ = inputs()
        with pytest.raises(ValueError, match="'flash'; choose one of auto, reference, split"):
            joint_attention(q, k, v, text_len=5, implementation="flash")
