"""Solvers of the flow's differential equation dx = v(x, sigma) dsigma, as tables of coefficients.

A solver evaluates the velocity v once or twice a step, and remembers a mixture m of x and v. After
each evaluation

    m_now = memory_x x + memory_v v
    x <- x + move v + correct (m_now - m),    m <- m_now

so that one compiled loop serves all of them: Euler never corrects, Heun remembers the velocity, and
DPM++ 2M the predicted x0.

At the ends of the schedule all are as in diffusers. The last step, to sigma 0, is Euler's in every
solver: Heun would evaluate the velocity where there is no noise, and DPM++ would extrapolate to an
infinite signal-to-noise ratio. DPM++ measures steps in the logarithm of that ratio, which is minus
infinity at sigma 1: where a run starts there, its second step has no use of the first one and is
Euler's too. What differs: diffusers gives Heun and DPM++ noise levels of their own (Heun's end
at 0.001 before the last step, DPM++'s start at 0.999) and rounds DPM++'s timesteps to whole
numbers; here all solvers visit the model's own schedule, with exact timesteps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from taca_jax.errors import UserError

Sampler = Literal["euler", "heun", "dpm++2m"]
"""`euler`: first order. `heun`: second order, two evaluations a step but the last (Karras et al.,
arXiv 2206.00364). `dpm++2m`: second order, one evaluation a step (Lu et al., arXiv 2211.01095)."""


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run in their order; arrays [n], float32 but `step`.

    step: the sampling step that an evaluation belongs to. sigma: the noise level at which it is
    made. move, correct, memory_x, memory_v: the coefficients (see the module).
    """

    step: np.ndarray
    sigma: np.ndarray
    move: np.ndarray
    correct: np.ndarray
    memory_x: np.ndarray
    memory_v: np.ndarray


def evaluations(sampler: Sampler, sigmas: np.ndarray) -> Evaluations:
    """The evaluations of a run over `sigmas`, float32 [steps + 1], falling.

    Raises UserError for a sampler that there is not.
    """
    if sampler not in get_args(Sampler):
        raise UserError(f"sampler is {sampler!r}; it must be one of {', '.join(get_args(Sampler))}")
    return _SOLVERS[sampler](sigmas)


def evaluation_count(sampler: Sampler, steps: int) -> int:
    """How often a run of so many steps evaluates the model."""
    return len(evaluations(sampler, np.linspace(1, 0, steps + 1, dtype=np.float32)).step)


def _euler(sigmas: np.ndarray) -> Evaluations:
    none = np.zeros(len(sigmas) - 1, np.float32)
    return Evaluations(
        step=np.arange(len(none)),
        sigma=sigmas[:-1],
        move=np.diff(sigmas),
        correct=none,
        memory_x=none,
        memory_v=none,
    )


def _heun(sigmas: np.ndarray) -> Evaluations:
    """First an Euler step; then half the change of the velocity over it corrects it."""
    steps, last = np.arange(len(sigmas) - 1).repeat(2), sigmas[-1] == 0
    second = np.arange(len(steps)) % 2 == 1
    length = np.diff(sigmas)[steps]
    found = Evaluations(
        step=steps,
        sigma=np.where(second, sigmas[1:][steps], sigmas[:-1][steps]),
        move=np.where(second, 0, length),
        correct=np.where(second, length / 2, 0),
        memory_x=np.zeros_like(length),
        memory_v=np.ones_like(length),
    )
    return Evaluations(**{k: v[: -1 if last else None] for k, v in vars(found).items()})


def _dpm_multistep(sigmas: np.ndarray) -> Evaluations:
    """An Euler step, which is DPM++'s first order in a flow, and the change of the predicted x0
    since the evaluation before, as far as the two steps' lengths say."""
    sigma = sigmas.astype(np.float64)
    now, after = sigma[:-1], sigma[1:]
    with np.errstate(divide="ignore"):
        length = np.diff(np.log1p(-sigma) - np.log(sigma))  # of each step in log SNR / 2
    correct = np.zeros_like(now)
    for i in range(1, len(now)):
        if np.isfinite(length[i]):
            weight = (1 - after[i]) - (1 - now[i]) * after[i] / now[i]
            correct[i] = weight * length[i] / length[i - 1] / 2
    return Evaluations(
        step=np.arange(len(now)),
        sigma=sigmas[:-1],
        move=np.diff(sigmas),
        correct=correct.astype(np.float32),
        memory_x=np.ones_like(sigmas[:-1]),
        memory_v=-sigmas[:-1],
    )


_SOLVERS: dict[Sampler, Callable[[np.ndarray], Evaluations]] = {
    "euler": _euler,
    "heun": _heun,
    "dpm++2m": _dpm_multistep,
}
