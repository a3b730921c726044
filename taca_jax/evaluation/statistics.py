"""Intervals for shares of pictures that are right, and for differences on the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy import stats


@dataclass(frozen=True, slots=True)
class Share:
    """A share of successes with the bounds of its confidence interval, each in 0..1."""

    value: float
    low: float
    high: float
    total: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """share(b) - share(a) over the same prompts and seeds, with its interval, each in -1..1.

    `p_value` is McNemar's exact test that a and b are right equally often.
    """

    value: float
    low: float
    high: float
    p_value: float
    gained: int  # right in b alone
    lost: int  # right in a alone
    total: int


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Share:
    """Wilson's score interval of a binomial share (Wilson, 1927). Raises ValueError if empty."""
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}: expected 0..{total} of at least one")
    z = _quantile(confidence)
    share = successes / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    # Exact at the ends, where rounding would leave a hair's breadth.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == total else center + half
    return Share(share, low, high, total)


def paired_difference(
    a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray, confidence: float = 0.95
) -> PairedDifference:
    """How much oftener b is right than a; a[i] and b[i] are of the same prompt and seed.

    The interval is Wald's with half an observation added to each cell (Agresti and Min, 2005),
    which keeps its coverage where few pairs differ. Raises ValueError for unequal lengths.
    """
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise ValueError(f"expected two lists of one length, got {first.shape} and {second.shape}")
    total = first.size
    gained = int((second & ~first).sum())
    lost = int((first & ~second).sum())
    only_b, only_a, padded = gained + 0.5, lost + 0.5, total + 2
    center = (only_b - only_a) / padded
    half = _quantile(confidence) * sqrt(only_a + only_b - (only_b - only_a) ** 2 / padded) / padded
    differing = gained + lost
    return PairedDifference(
        value=(gained - lost) / total,
        low=max(center - half, -1.0),
        high=min(center + half, 1.0),
        p_value=float(stats.binomtest(gained, differing).pvalue) if differing else 1.0,
        gained=gained,
        lost=lost,
        total=total,
    )


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    return float(stats.norm.ppf((1 + confidence) / 2))
