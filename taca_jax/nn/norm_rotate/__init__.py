"""Queries and keys made ready for a joint attention: RMS-normalised per head, rotated, and joined.

`api` is what to call, `reference` says what is computed, `pallas_tpu` is the kernel.
"""

from taca_jax.nn.norm_rotate.api import norm_rotate
from taca_jax.nn.norm_rotate.reference import join

__all__ = ["join", "norm_rotate"]
