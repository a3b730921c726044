"""Training: a base from scratch, or a LoRA under TACA on a frozen base."""

from taca_jax.training.run import train

__all__ = ["train"]
