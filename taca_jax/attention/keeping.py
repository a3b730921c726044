"""What a rematerialised block may keep of its attention instead of computing it again."""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"
"""The name, for `jax.checkpoint` policies, of what an attention's backward pass needs beside its
inputs: the output and the sums of its softmax. cuDNN's, on GPUs, has no name."""

T = TypeVar("T")


def keepable(arrays: T, name: str = ATTENTION) -> T:
    """The arrays, under a name that a policy may keep."""
    return jax.tree.map(lambda array: checkpoint_name(array, name), arrays)
