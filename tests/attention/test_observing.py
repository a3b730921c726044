"""Observing attentions: what is seen, and that nothing is done where nobody looks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.attention import joint_attention, joint_attention_with_log_sums
from taca_jax.attention.observing import layer, observed, record

SHAPE = (2, 7, 3, 8)
TEXT = 3


def inputs(count):
    return jax.random.normal(jax.random.key(0), (count, *SHAPE))


def attend(x, text_len=TEXT):
    return joint_attention(x, x, x, text_len=text_len, gamma=1.5)


def looped(xs):
    """The attentions of all xs, in a loop."""

    def body(carry, x):
        out, seen = layer(partial(attend, x))
        return carry + out.sum(), (out, seen)

    _, (out, seen) = jax.lax.scan(body, jnp.zeros(()), xs)
    record(seen)
    return out


def text_mass(attention):
    return attention.sums.text_mass


def test_what_is_seen_is_in_the_order_of_layers():
    xs = inputs(4)

    @jax.jit
    def run(xs):
        return observed(text_mass, lambda: (attend(xs[0]), looped(xs[1:3]), attend(xs[3])))

    @jax.jit
    def alone(x):
        return joint_attention_with_log_sums(x, x, x, text_len=TEXT, gamma=1.5)

    (first, middle, last), seen = run(xs)
    assert seen.shape == (4, 2, 3, 7)
    for x, out, mass in zip(xs, [first, *middle, last], seen, strict=True):
        expected, sums = alone(x)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mass, sums.text_mass, rtol=1e-5)


def test_attention_among_image_tokens_alone_is_not_shown():
    (x,) = inputs(1)
    both = jax.eval_shape(
        lambda x: observed(text_mass, lambda: (attend(x, text_len=0), attend(x)))[1], x
    )
    assert both.shape == (1, 2, 3, 7)
    none = jax.eval_shape(lambda x: observed(text_mass, lambda: attend(x, text_len=0))[1], x)
    assert none is None


def test_a_program_that_nobody_observes_is_the_same_as_before():
    xs = inputs(2)
    before = str(jax.make_jaxpr(looped)(xs))
    jaxpr = jax.make_jaxpr(lambda xs: observed(text_mass, lambda: looped(xs)))(xs)
    assert len(str(jaxpr)) > len(before)
    with pytest.raises(ZeroDivisionError):
        observed(lambda _: 1 / 0, lambda: attend(xs[0]))
    again = jax.make_jaxpr(lambda xs: looped(xs))(xs)
    assert str(again) == before
    (loop,) = (each for each in again.eqns if each.primitive.name == "scan")
    assert len(loop.outvars) == 2  # the carry and the outputs
