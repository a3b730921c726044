"""Confidence intervals for the mean of scores, and for the difference of two means.

As in `statistics`, pictures of the same prompt are not independent: the prompts are the units. The
standard error of the mean is that of a one-stage cluster sample (Cochran, Sampling Techniques,
1977, section 9A), and Student's t has a degree of freedom less than there are prompts. If each
prompt has the same number of pictures, this is the usual interval for the mean of the prompts'
means.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy import stats

from taca_jax.evaluation.statistics import numbered


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean score with its confidence interval, which is None if there is only one prompt."""

    value: float
    low: float | None
    high: float | None
    total: int  # pictures
    prompts: int  # distinct ones


@dataclass(frozen=True, slots=True)
class MeanDifference(Mean):
    """mean(b) - mean(a) over the same pictures, with its interval.

    `p_value`, of the two-sided t test, is for the hypothesis that the means are equal; None if
    there is only one prompt.
    """

    p_value: float | None


def mean_interval(
    scores: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    confidence: float = 0.95,
) -> Mean:
    """The mean of `scores`, float [n], with an interval that allows for clusters.

    clusters: the prompt of each score, [n]. Raises ValueError if there are no scores, or another
    number of clusters.
    """
    values = np.asarray(scores, np.float64)
    error, prompts = _standard_error(values, clusters)
    return Mean(*_interval(float(values.mean()), error, prompts, confidence), values.size, prompts)


def mean_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    confidence: float = 0.95,
) -> MeanDifference:
    """How much higher the scores of b are than those of a, both float [n]; a[i] and b[i] share
    prompt and seed.

    clusters: the prompt of each pair, [n]. Raises ValueError if there are no pairs, or if a, b and
    clusters differ in length.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"expected two lists of one length, got {first.shape} and {second.shape}")
    values = second - first
    error, prompts = _standard_error(values, clusters)
    value, low, high = _interval(float(values.mean()), error, prompts, confidence)
    p_value = None
    if error is not None:
        distance = abs(value) / error if error > 0 else np.inf
        p_value = 1.0 if value == 0 else float(2 * stats.t.sf(distance, prompts - 1))
    return MeanDifference(value, low, high, values.size, prompts, p_value)


def _standard_error(
    values: np.ndarray, clusters: Sequence[Hashable] | np.ndarray
) -> tuple[float | None, int]:
    """The standard error of the mean, None for a single cluster; and the number of clusters."""
    cluster = numbered(clusters, values)
    count = int(cluster.max()) + 1
    if count == 1:
        return None, 1
    sums = np.bincount(cluster, values - values.mean())
    return sqrt(count / (count - 1) * float(np.sum(sums**2))) / values.size, count


def _interval(
    value: float, error: float | None, prompts: int, confidence: float
) -> tuple[float, float | None, float | None]:
    if error is None:
        return value, None, None
    half = float(stats.t.ppf((1 + confidence) / 2, prompts - 1)) * error
    return value, value - half, value + half
