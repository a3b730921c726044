"""The optimizer: AdamW, Adafactor or Muon, with its learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float
from optax.contrib import MuonDimensionNumbers, muon

from taca_jax.config.fields import check
from taca_jax.errors import UserError

_LARGEST_UPDATE = 1.0
"""Adafactor's clipping: of the root mean square of a parameter's update, before the learning
rate."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, Adafactor or Muon, with warm-up and clipping by global norm.

    kind: `adamw`; `adafactor` (Shazeer and Stern 2018), which keeps no first moments, and of the
      second ones of a matrix only the means of rows and columns, where both sides are 128 or more;
      or `muon` (Jordan et al. 2024), which trains from scratch in fewer steps. Muon updates kernels
      between hidden states by their orthogonalised momentum, scaled to a root mean square of about
      1 like Adam's first step, so that one learning rate serves all. The kernels of img_in, of
      modulations and of the output, and all other parameters, are updated by AdamW with Nesterov
      momentum.
    learning_rate: the maximum, reached after warm-up.
    warmup_steps: optimizer steps of linear warm-up; all steps of a run that has fewer.
    schedule: after warm-up, `constant`; `linear` or `cosine` down to 0 at the last step; or
      `restarts`, cosine down to 0 several times, each time from the maximum.
    cycles: how many times, with schedule=restarts; all are of the same length.
    decay_steps: optimizer steps at the end of a constant schedule in which the rate falls linearly
      to 0.
    weight_decay: decoupled, on matrices (kernels, LoRA factors, embeddings) only; with kind=muon on
      the kernels that it orthogonalises only.
    b1, b2: decay of Adam's first and second moment; not for adafactor, whose decay grows with the
      steps.
    muon_beta: decay of Muon's momentum; for kind=muon only.
    clip_norm: maximum norm of the gradient over all trained parameters; none never clips.
    ema_decay: decay of the moving average of the trained parameters, which is then sampled,
      evaluated and exported; 0 uses the parameters themselves.
    """

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine", "restarts"] = "constant"
    cycles: int = 1
    decay_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    muon_beta: float = 0.95
    clip_norm: float | None = 1.0
    ema_decay: float = 0.0

    def __post_init__(self):
        rate, decay, clip = self.learning_rate, self.weight_decay, self.clip_norm
        check(0 < rate < math.inf, "optimizer.learning_rate", rate, "positive")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        check(self.decay_steps >= 0, "optimizer.decay_steps", self.decay_steps, "0 or more")
        if self.decay_steps and self.schedule != "constant":
            raise UserError(
                f"optimizer.decay_steps is {self.decay_steps}, which optimizer.schedule="
                f"{self.schedule} does not read; leave it out, or set optimizer.schedule=constant"
            )
        check(self.cycles >= 1, "optimizer.cycles", self.cycles, "1 or more")
        if self.cycles > 1 and self.schedule != "restarts":
            raise UserError(
                f"optimizer.cycles is {self.cycles}, which optimizer.schedule={self.schedule} does "
                "not read; leave it out, or set optimizer.schedule=restarts"
            )
        check(0 <= decay < math.inf, "optimizer.weight_decay", decay, "0 or more")
        decays = {
            "b1": self.b1,
            "b2": self.b2,
            "muon_beta": self.muon_beta,
            "ema_decay": self.ema_decay,
        }
        for name, value in decays.items():
            check(0 <= value < 1, f"optimizer.{name}", value, "at least 0 and below 1")
        check(clip is None or clip > 0, "optimizer.clip_norm", clip, "positive, or none")
        if self.kind != "muon" and self.muon_beta != OptimizerConfig.muon_beta:
            raise UserError(
                f"optimizer.muon_beta is {self.muon_beta}, which optimizer.kind={self.kind} has no "
                "use for; leave it out, or set optimizer.kind=muon"
            )

        betas = self.b1, self.b2
        if self.kind == "adafactor" and betas != (OptimizerConfig.b1, OptimizerConfig.b2):
            raise UserError(
                f"optimizer.b1 and b2 are {betas[0]} and {betas[1]}, which "
                "optimizer.kind=adafactor has no use for; leave them out, or set "
                "optimizer.kind=adamw"
            )

    def make(self, total_steps: int) -> optax.GradientTransformation:
        """The optax object for a run of `total_steps` optimizer steps."""
        clip = (
            optax.identity()
            if self.clip_norm is None
            else optax.clip_by_global_norm(self.clip_norm)
        )

        def rate(count: ArrayLike) -> Float[Array, ""]:
            return self.learning_rate_at(count, total_steps)

        if self.kind == "muon":
            update = muon(
                rate,
                beta=self.muon_beta,
                weight_decay=self.weight_decay,
                adam_b1=self.b1,
                adam_b2=self.b2,
                consistent_rms=1.0,
                muon_weight_dimension_numbers=_muon_axes,
            )
        elif self.kind == "adafactor":
            # Not optax.adafactor, whose weight decay leaves the learning rate out, and which by
            # default multiplies that by each parameter's size, 0 for a new LoRA's B.
            update = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(_LARGEST_UPDATE),
                optax.add_decayed_weights(self.weight_decay, mask=_is_matrix),
                optax.scale_by_learning_rate(rate),
            )
        else:
            update = optax.adamw(
                rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=_is_matrix
            )
        return optax.chain(clip, update)

    def learning_rate_at(self, count: ArrayLike, total_steps: int) -> Float[Array, "*n"]:
        """The learning rate of the update that follows `count` updates, float32, traceable.

        Warm-up starts and a decline ends above 0, so that every step has an effect.
        """
        count = jnp.asarray(count, jnp.float32)
        warmup = min(self.warmup_steps, total_steps)
        warm = jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        if self.schedule == "constant":
            declining = (total_steps - count) / max(self.decay_steps, 1)
            left = jnp.clip(declining, 0, 1) if self.decay_steps else 1.0
            return self.learning_rate * warm * left
        progress = jnp.clip((count - warmup) / max(total_steps - warmup, 1), 0, 1)
        if self.schedule == "restarts":
            progress = progress * self.cycles % 1
        left = 1 - progress if self.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return self.learning_rate * warm * left


def _muon_axes(params: Any) -> Any:
    """For each parameter the axes of its matrices, or None if AdamW updates it.

    Muon is for matrices between hidden states. Its author leaves a model's first and last layer to
    Adam; so do we, and also the layers that compute modulations from one vector per picture.
    """
    not_hidden = {"img_in", "mod", "final_mod", "final_out", "readout"}

    def axes(path: tuple[Any, ...], param: jax.Array) -> MuonDimensionNumbers | None:
        names = {jax.tree_util.keystr((key,), simple=True) for key in path}
        if "kernel" not in names or names & not_hidden:
            return None
        # An axis before these two is the layer axis of a stack.
        return MuonDimensionNumbers(reduction_axis=param.ndim - 2, output_axis=param.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_matrix(params: Any) -> Any:
    """For each parameter whether weight decay acts on it.

    By name, not by rank: stacked blocks give biases and norms a leading layer axis.
    """
    names = {"kernel", "lora_a", "lora_b", "embedding"}

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not names.isdisjoint(jax.tree_util.keystr((key,), simple=True) for key in path)

    return jax.tree_util.tree_map_with_path(decays, params)
