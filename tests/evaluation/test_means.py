"""Intervals of mean scores: against SciPy where prompts are distinct, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from taca_jax.evaluation.means import mean_difference, mean_interval


def test_with_distinct_prompts_they_are_students():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 0.1, 20), rng.normal(0.55, 0.1, 20)
    mean = mean_interval(a, range(20))
    expected = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert (mean.low, mean.high) == pytest.approx((expected.low, expected.high))
    assert (mean.total, mean.prompts) == (20, 20)
    gap, test = mean_difference(a, b, range(20)), stats.ttest_rel(b, a)
    assert gap.p_value == pytest.approx(test.pvalue)
    interval = test.confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx((interval.low, interval.high))
    assert gap.value == pytest.approx(np.mean(b - a))


def test_with_as_many_pictures_of_each_prompt_they_are_those_of_the_prompts_means():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(12, 1)) + 0.1 * rng.normal(size=(12, 10))
    prompts = np.repeat(np.arange(12), 10)
    whole, each = mean_interval(scores.ravel(), prompts), mean_interval(scores.mean(1), range(12))
    assert (whole.value, whole.low, whole.high) == pytest.approx((each.value, each.low, each.high))
    assert whole.total == 120
    # Independent pictures would promise an interval of less than half the width.
    assert whole.high - whole.low > 2 * (
        mean_interval(scores.ravel(), range(120)).high
        - mean_interval(scores.ravel(), range(120)).value
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """In 1000 experiments of 25 prompts with 1 to 6 pictures each; binomial deviation 0.7 %."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        prompts = np.repeat(np.arange(25), rng.integers(1, 7, 25))
        scores = rng.normal(size=25)[prompts] + rng.normal(size=prompts.size)
        mean = mean_interval(scores, prompts)
        covered += mean.low <= 0 <= mean.high
    assert 920 <= covered <= 970


def test_a_single_prompt_and_equal_scores():
    mean = mean_interval([0.2, 0.4], ["a", "a"])
    assert mean.value == pytest.approx(0.3)
    assert (mean.low, mean.high) == (None, None)
    assert mean_difference([0.1], [0.2], ["a"]).p_value is None
    assert mean_difference([0.1, 0.2], [0.1, 0.2], "ab").p_value == 1
    gap = mean_difference([0.0, 0.0], [0.5, 0.5], "ab")
    assert (gap.value, gap.low, gap.p_value) == (0.5, 0.5, 0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="of 1 clusters"):
        mean_interval([0.1, 0.2], ["a"])
    with pytest.raises(ValueError, match="of one length"):
        mean_difference([0.1], [0.1, 0.2], "ab")
