"""Pictures that are held out of training."""

import numpy as np
import pytest

from taca_jax.data.held_out import chosen, hold_out
from taca_jax.data.order import Bucket
from taca_jax.errors import UserError


def indices(buckets):
    return sorted(np.concatenate([part for b in buckets for part in b.parts]).tolist())


def test_what_is_held_out_is_in_its_bucket_and_in_no_other():
    buckets = [
        Bucket((32, 32), (np.arange(0, 30), np.arange(40, 45))),
        Bucket((48, 24), (np.arange(30, 40), np.arange(45, 50))),
    ]
    training, held = hold_out(buckets, 12)
    assert len(indices(held)) == 12
    assert sorted(indices(training) + indices(held)) == list(range(50))
    for found in (*training, *held):
        (own,) = [b for b in buckets if b.size == found.size]
        for part, whole in zip(found.parts, own.parts, strict=True):
            assert set(part.tolist()) <= set(whole.tolist())
    # Neither the buckets nor how many there are decide which they are.
    assert indices(hold_out([Bucket(None, (np.arange(50),))], 12)[1]) == indices(held)
    assert set(indices(hold_out(buckets, 5)[1])) <= set(indices(held))


def test_a_bucket_may_be_held_out_whole_but_not_all_of_them():
    one = [Bucket(None, (np.arange(8),))]
    first = indices(hold_out(one, 1)[1])
    rest = np.setdiff1d(np.arange(8), first)
    buckets = [Bucket((8, 8), (np.array(first),)), Bucket((8, 16), (rest,))]
    training, held = hold_out(buckets, 1)
    assert [b.size for b in training] == [(8, 16)]
    assert [b.size for b in held] == [(8, 8)]
    with pytest.raises(UserError, match="pictures=8 would hold out all 8 pictures of"):
        hold_out(one, 8)
    assert indices(chosen(one, 9)) == list(range(8))
