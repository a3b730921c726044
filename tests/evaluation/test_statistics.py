"""Intervals against known values and against simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from taca_jax.evaluation.statistics import paired_difference, wilson_interval


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (3, 10), (250, 500), (1, 1)])
def test_wilson_agrees_with_scipy(successes, total):
    share = wilson_interval(successes, total)
    expected = stats.binomtest(successes, total).proportion_ci(method="wilson")
    assert share.low == pytest.approx(expected.low, abs=1e-12)
    assert share.high == pytest.approx(expected.high, abs=1e-12)
    assert share.value == successes / total


def test_wider_confidence_is_a_wider_interval():
    narrow, wide = wilson_interval(30, 100, 0.9), wilson_interval(30, 100, 0.99)
    assert wide.low < narrow.low < 0.3 < narrow.high < wide.high


def test_paired_difference_counts_the_pairs_that_differ():
    a = [True] * 40 + [False] * 60
    b = [True] * 35 + [False] * 5 + [True] * 20 + [False] * 40
    difference = paired_difference(a, b)
    assert (difference.gained, difference.lost, difference.total) == (20, 5, 100)
    assert difference.value == pytest.approx(0.15)
    assert difference.p_value == pytest.approx(stats.binomtest(20, 25).pvalue)
    assert 0 < difference.low < 0.15 < difference.high
    mirrored = paired_difference(b, a)
    assert mirrored.low == pytest.approx(-difference.high)
    assert mirrored.p_value == difference.p_value


def test_no_pair_that_differs_is_no_evidence():
    same = paired_difference([True, False] * 50, [True, False] * 50)
    assert same.value == 0
    assert same.p_value == 1
    assert same.low < 0 < same.high


def test_paired_intervals_cover_the_true_difference():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        a = rng.random(100) < 0.5
        b = np.where(rng.random(100) < 0.2, rng.random(100) < 0.9, a)
        difference = paired_difference(a, b)
        covered.append(difference.low <= 0.2 * (0.9 - 0.5) <= difference.high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match=r"11 successes of 10"):
        wilson_interval(11, 10)
    with pytest.raises(ValueError, match=r"0 successes of 0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        paired_difference([True, False], [True])
    with pytest.raises(ValueError, match=r"confidence 95 is not between 0 and 1"):
        wilson_interval(1, 2, 95)
