"""Confidence intervals for the share of right pictures, and for the difference of two shares.

Pictures of the same prompt tend to be right or wrong together, so that they carry less information
than as many pictures of distinct prompts. The functions here take each picture's prompt and treat
the prompts, the clusters, as the independent units. If all prompts are distinct, the results are
the usual ones for independent pictures: Wilson's interval, McNemar's exact test, and the interval
of Agresti and Min.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy import stats


@dataclass(frozen=True, slots=True)
class Share:
    """A share of right pictures with its confidence interval, each in 0..1."""

    value: float
    low: float
    high: float
    total: int  # pictures
    prompts: int  # distinct ones


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """share(b) - share(a) over the same prompts and seeds, with its interval, each in -1..1.

    `p_value` is for the hypothesis that a and b are right equally often.
    """

    value: float
    low: float
    high: float
    p_value: float
    gained: int  # pictures that are right in b alone
    lost: int  # pictures that are right in a alone
    total: int  # pictures in each of a and b
    prompts: int  # distinct ones


def share_interval(
    correct: Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    confidence: float = 0.95,
) -> Share:
    """The share of `correct`, bool [n], with an interval that allows for clusters.

    clusters: the prompt of each outcome, [n]. The interval is Wilson's (1927) for the effective
    number of outcomes (Korn and Graubard, Survey Methodology 24, 1998); Franco et al. (J. Survey
    Statistics and Methodology 7, 2019) compare it with others and recommend it. Raises ValueError
    if there are no outcomes, or another number of clusters.
    """
    outcomes = np.asarray(correct, bool)
    cluster = numbered(clusters, outcomes)
    value = float(outcomes.mean())
    size = _effective_size(outcomes.astype(float), cluster, confidence)
    # SciPy's interval takes whole numbers of outcomes only; the effective number is none.
    z2 = _quantile(confidence) ** 2 / size
    half = sqrt(z2 * value * (1 - value) + z2**2 / 4)
    # Set exactly at the ends, where the formula would leave a rounding error.
    low = 0.0 if value == 0 else (value + z2 / 2 - half) / (1 + z2)
    high = 1.0 if value == 1 else (value + z2 / 2 + half) / (1 + z2)
    return Share(value, low, high, outcomes.size, int(cluster.max()) + 1)


def paired_difference(
    a: Sequence[bool] | np.ndarray,
    b: Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    confidence: float = 0.95,
) -> PairedDifference:
    """How much more often b is right than a, both bool [n]; a[i] and b[i] share prompt and seed.

    clusters: the prompt of each pair, [n]. The p-value is that of the exact sign-flip test, which
    swaps a and b in whole clusters (Canay, Romano and Shaikh, Econometrica 85, 2017); with distinct
    prompts it is McNemar's. The interval is Wald's with half an observation added to each cell
    (Agresti and Min, Statistics in Medicine 24, 2005), which keeps its coverage if few pairs
    differ, for the effective number of pairs. Raises ValueError if there are no pairs, or if a, b
    and clusters differ in length.
    """
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    if first.shape != second.shape:
        raise ValueError(f"expected two lists of one length, got {first.shape} and {second.shape}")
    cluster = numbered(clusters, first)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    total = first.size
    differences = second.astype(float) - first
    size = _effective_size(differences, cluster, confidence)
    only_b, only_a = (count * size / total + 0.5 for count in (gained, lost))
    padded = size + 2
    center = (only_b - only_a) / padded
    half = _quantile(confidence) * sqrt(only_a + only_b - (only_b - only_a) ** 2 / padded) / padded
    return PairedDifference(
        value=(gained - lost) / total,
        low=max(center - half, -1.0),
        high=min(center + half, 1.0),
        p_value=_sign_flip_p_value(np.bincount(cluster, differences).astype(int)),
        gained=gained,
        lost=lost,
        total=total,
        prompts=int(cluster.max()) + 1,
    )


def numbered(clusters: Sequence[Hashable] | np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """int [n]: the cluster of each outcome, counted from 0."""
    if outcomes.ndim != 1 or outcomes.size == 0 or len(clusters) != outcomes.size:
        raise ValueError(
            f"outcomes {list(outcomes.shape)} of {len(clusters)} clusters: expected a list of at "
            "least one outcome, and the cluster of each"
        )
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(each, len(numbers)) for each in clusters])


def _effective_size(values: np.ndarray, cluster: np.ndarray, confidence: float) -> float:
    """The number of independent values that would determine the mean as well; at most all of them.

    It is the number of values divided by the design effect: the variance of the mean between
    clusters (of a linearised ratio estimator) over that of independent values. Following Korn and
    Graubard, it is reduced once more because the variance is estimated from few clusters.
    """
    total, clusters = values.size, int(cluster.max()) + 1
    if clusters == total:
        return total
    deviations = values - values.mean()
    independent = np.sum(deviations**2) / (total * (total - 1))
    if independent == 0 or clusters == 1:
        return clusters  # agreement within clusters is unknown: assume it is full
    clustered = np.sum(np.bincount(cluster, deviations) ** 2) / total**2
    design_effect = max(clustered * clusters / (clusters - 1) / independent, 1.0)
    many, few = stats.t.ppf((1 + confidence) / 2, [total - 1, clusters - 1])
    return float(total / design_effect * (many / few) ** 2)


def _sign_flip_p_value(sums: np.ndarray) -> float:
    """The probability that the sum of these integers with random signs is at least as far from 0.

    Exact: the distribution of the sum is built up number by number.
    """
    sizes = np.abs(sums)
    probability = np.ones(1)  # of each sum from -reach to reach
    for size in sizes[sizes > 0]:
        flat = np.pad(probability, size)
        probability = (np.roll(flat, size) + np.roll(flat, -size)) / 2
    reach = sizes.sum()
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(sums.sum())
    return min(float(probability[far].sum()), 1.0)


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    return float(stats.norm.ppf((1 + confidence) / 2))
