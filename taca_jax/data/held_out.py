"""Holds pictures out of training, so that a model can be measured on what it never saw."""

from collections.abc import Sequence

import numpy as np

from taca_jax.data.order import Bucket, uniform
from taca_jax.errors import UserError

_SEED = 0x48454C44
"""Not the run's, so that runs with other seeds hold out the same pictures."""


def chosen(buckets: Sequence[Bucket], count: int) -> list[Bucket]:
    """`count` of the examples of all buckets, or all if there are fewer, in buckets of their own.

    Which they are depends on the examples' indices alone.
    """
    indices = np.concatenate([part for bucket in buckets for part in bucket.parts])
    picked = indices[np.argsort(uniform(indices, _SEED), kind="stable")[:count]]
    return _within(buckets, picked, wanted=True)


def hold_out(buckets: Sequence[Bucket], count: int) -> tuple[list[Bucket], list[Bucket]]:
    """The buckets without the `count` examples that `chosen` gives, and the buckets of these.

    Raises UserError if nothing would be left.
    """
    total = sum(map(len, buckets))
    if count >= total:
        raise UserError(
            f"validation.pictures={count} would hold out all {total} pictures of data.source; "
            "lower it, or give validation.source=..."
        )
    held = chosen(buckets, count)
    picked = np.concatenate([part for bucket in held for part in bucket.parts])
    return _within(buckets, picked, wanted=False), held


def _within(buckets: Sequence[Bucket], picked: np.ndarray, *, wanted: bool) -> list[Bucket]:
    """Of the buckets' examples those that are `picked`, or those that are not."""
    found = []
    for bucket in buckets:
        parts = tuple(part[np.isin(part, picked) == wanted] for part in bucket.parts)
        if any(map(len, parts)):
            found.append(Bucket(bucket.size, parts))
    return found
