"""Intervals and tests against known values, and their coverage in simulation."""

import numpy as np
import pytest
from scipy import stats

from taca_jax.evaluation.statistics import paired_difference, share_interval


def right(successes, total):
    return [True] * successes + [False] * (total - successes)


def distinct(total):
    return range(total)


# Distinct prompts: independent pictures


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (3, 10), (250, 500), (1, 1)])
def test_with_distinct_prompts_the_interval_is_wilsons(successes, total):
    share = share_interval(right(successes, total), distinct(total))
    expected = stats.binomtest(successes, total).proportion_ci(method="wilson")
    assert share.low == pytest.approx(expected.low, abs=1e-12)
    assert share.high == pytest.approx(expected.high, abs=1e-12)
    assert share.value == successes / total
    assert (share.total, share.prompts) == (total, total)


def test_wider_confidence_is_a_wider_interval():
    prompts = [i % 40 for i in range(100)]
    narrow, wide = (share_interval(right(30, 100), prompts, level) for level in (0.9, 0.99))
    assert wide.low < narrow.low < 0.3 < narrow.high < wide.high


A = right(40, 100)
B = [True] * 35 + [False] * 5 + [True] * 20 + [False] * 40


def test_with_distinct_prompts_the_difference_is_of_independent_pairs():
    difference = paired_difference(A, B, distinct(100))
    assert (difference.gained, difference.lost) == (20, 5)
    assert (difference.total, difference.prompts) == (100, 100)
    assert difference.value == pytest.approx(0.15)
    assert difference.p_value == pytest.approx(stats.binomtest(20, 25).pvalue)  # McNemar's
    assert (difference.low, difference.high) == pytest.approx((0.0533279377, 0.2407897094))
    mirrored = paired_difference(B, A, distinct(100))
    assert mirrored.low == pytest.approx(-difference.high)
    assert mirrored.p_value == pytest.approx(difference.p_value)


def test_no_pair_that_differs_is_no_evidence():
    same = paired_difference([True, False] * 50, [True, False] * 50, distinct(100))
    assert same.value == 0
    assert same.p_value == 1
    assert same.low < 0 < same.high


# Several pictures of a prompt


def test_the_number_of_distinct_prompts_is_said():
    prompts = ["a circle", "a cross", "a circle", "a circle"]
    assert share_interval(right(2, 4), prompts).prompts == 2
    assert paired_difference(right(2, 4), right(3, 4), prompts).prompts == 2


def test_pictures_that_always_agree_count_once_per_prompt():
    """Five copies of each of 40 outcomes say as much as the 40, but for the smaller t quantile."""
    outcomes = np.random.default_rng(0).random(40) < 0.3
    copies = share_interval(np.repeat(outcomes, 5), np.repeat(np.arange(40), 5))
    alone = share_interval(outcomes, np.arange(40))
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    other = np.random.default_rng(1).random(40) < 0.6
    prompts = np.repeat(np.arange(40), 5)
    copies = paired_difference(np.repeat(outcomes, 5), np.repeat(other, 5), prompts)
    alone = paired_difference(outcomes, other, np.arange(40))
    assert copies.p_value == pytest.approx(alone.p_value)
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high), abs=0.02)


def test_the_order_of_pictures_does_not_matter():
    rng = np.random.default_rng(0)
    prompts, a, b = rng.integers(0, 9, 50), rng.random(50) < 0.4, rng.random(50) < 0.6
    order = rng.permutation(50)
    assert paired_difference(a, b, prompts).p_value == pytest.approx(
        paired_difference(a[order], b[order], prompts[order]).p_value
    )
    assert share_interval(a, prompts).low == pytest.approx(
        share_interval(a[order], prompts[order]).low
    )


def test_the_sign_flip_test_agrees_with_scipys():
    rng = np.random.default_rng(3)
    prompts = np.repeat(np.arange(10), 4)
    a, b = rng.random(40) < 0.3, rng.random(40) < 0.6
    sums = np.bincount(prompts, b.astype(float) - a)
    every = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert paired_difference(a, b, prompts).p_value == pytest.approx(every.pvalue)


@pytest.mark.parametrize("correct", [False, True])
def test_where_all_pictures_agree_each_prompt_counts_once(correct):
    """Nothing shows how far pictures of a prompt agree: the interval assumes the worst."""
    share = share_interval([correct] * 100, [i % 40 for i in range(100)])
    expected = share_interval([correct] * 40, distinct(40))
    assert (share.low, share.high) == (expected.low, expected.high)
    alone = share_interval([correct] * 9, ["one prompt"] * 9)
    assert alone.high - alone.low > 0.7


def test_intervals_stay_within_their_range():
    rng = np.random.default_rng(0)
    for prompts in (np.repeat([0, 1], 20), np.zeros(40, int), np.repeat(np.arange(4), 10)):
        for chance in (0.02, 0.5, 0.98):
            a, b = rng.random(40) < chance, rng.random(40) < 1 - chance
            share, difference = share_interval(a, prompts), paired_difference(a, b, prompts)
            assert 0 <= share.low <= share.value <= share.high <= 1
            assert -1 <= difference.low < difference.high <= 1
            assert 0 < difference.p_value <= 1


# Coverage: how often an interval of 95 % holds the truth

ROUNDS = 400
PROMPTS = np.repeat(np.arange(40), 5)


def test_intervals_of_shares_cover_the_truth_where_pictures_of_a_prompt_agree():
    rng = np.random.default_rng(0)
    by_prompt, naive = [], []
    for _ in range(ROUNDS):
        correct = rng.random(200) < rng.beta(1, 1, 40)[PROMPTS]  # half on average
        for covered, clusters in ((by_prompt, PROMPTS), (naive, np.arange(200))):
            share = share_interval(correct, clusters)
            covered.append(share.low <= 0.5 <= share.high)
    assert 0.92 <= np.mean(by_prompt) <= 0.98
    assert np.mean(naive) < 0.85


def test_differences_are_judged_by_prompt_where_pictures_of_a_prompt_agree():
    """a is better for some prompts and b for others, and neither on the whole."""
    rng = np.random.default_rng(0)
    covered, rejected, naively_covered, naively_rejected = [], [], [], []
    for _ in range(ROUNDS):
        a, b = (rng.random(200) < rng.beta(1, 1, 40)[PROMPTS] for _ in range(2))
        by_prompt = paired_difference(a, b, PROMPTS)
        naive = paired_difference(a, b, np.arange(200))
        covered.append(by_prompt.low <= 0 <= by_prompt.high)
        rejected.append(by_prompt.p_value <= 0.05)
        naively_covered.append(naive.low <= 0 <= naive.high)
        naively_rejected.append(naive.p_value <= 0.05)
    assert 0.92 <= np.mean(covered) <= 0.98
    assert np.mean(rejected) <= 0.07
    assert np.mean(naively_covered) < 0.85
    assert np.mean(naively_rejected) > 0.12


def test_paired_intervals_cover_the_true_difference():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(ROUNDS):
        a = rng.random(100) < 0.5
        b = np.where(rng.random(100) < 0.2, rng.random(100) < 0.9, a)
        difference = paired_difference(a, b, distinct(100))
        covered.append(difference.low <= 0.2 * (0.9 - 0.5) <= difference.high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match=r"outcomes \[0\] of 0 clusters: expected a list of at"):
        share_interval([], [])
    with pytest.raises(ValueError, match=r"outcomes \[2\] of 3 clusters"):
        share_interval([True, False], "abc")
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        paired_difference([True, False], [True], "ab")
    with pytest.raises(ValueError, match=r"confidence 95 is not between 0 and 1"):
        share_interval([True, False], "ab", 95)
