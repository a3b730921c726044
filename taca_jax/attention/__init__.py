"""Joint text-image attention with TACA's temperature gamma: one call, several ways to run."""

from taca_jax.attention.api import (
    Implementation,
    joint_attention,
    joint_attention_with_log_sums,
)
from taca_jax.attention.log_sums import LogSums

__all__ = ["Implementation", "LogSums", "joint_attention", "joint_attention_with_log_sums"]
