"""Joint text-image attention with TACA's temperature, in several exact implementations."""

from taca_jax.attention.api import Implementation, joint_attention

__all__ = ["Implementation", "joint_attention"]
