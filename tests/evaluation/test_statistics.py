"""Intervals that cover what they claim, and agreement with scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from auto_voice.evaluation.results import estimate, holm, wilcoxon


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        found = estimate(rng.normal(3.0, 2.0, 40), resamples=400, seed=trial)
        hits += found.low <= 3.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_the_same_data_gives_the_same_interval() -> None:
    x = np.random.default_rng(1).normal(size=30)
    assert estimate(x) == estimate(x)


def test_agrees_with_scipy_percentile_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(2).exponential(size=60)
    theirs = stats.bootstrap(
        (x,), np.mean, method="percentile", n_resamples=9000, rng=np.random.default_rng(3)
    ).confidence_interval
    ours = estimate(x, resamples=9000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_a_rate_is_the_ratio_of_sums() -> None:
    found = estimate([1, 0], [10, 90])
    assert found.value == pytest.approx(0.01)  # the mean of the pairs' rates would be 0.05
    assert found.low <= 0.01 <= found.high


def test_pairs_that_share_a_speaker_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(4)
    speakers = np.repeat(np.arange(6), 20)
    values = rng.normal(size=6)[speakers] + 0.1 * rng.normal(size=120)
    by_pair = estimate(values)
    by_speaker = estimate(values, groups=list(speakers))
    assert by_speaker.value == pytest.approx(by_pair.value)
    assert by_speaker.high - by_speaker.low > 2 * (by_pair.high - by_pair.low)


def test_missing_values_are_left_out_and_one_pair_has_no_interval() -> None:
    found = estimate([1.0, math.nan])
    assert (found.value, found.n) == (1.0, 1)
    assert math.isnan(found.low)
    assert estimate([math.nan]).n == 0
    assert estimate([0.0, 0.0], [0.0, 0.0]).n == 0


@pytest.mark.parametrize("n", [5, 12, 30, 80])
def test_signed_rank_test_agrees_with_scipy(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    d = np.random.default_rng(n).normal(0.3, 1, n)
    if n <= 50:
        expected = stats.wilcoxon(d, method="exact").pvalue
    else:
        expected = stats.wilcoxon(d, method="asymptotic", correction=True).pvalue
    assert wilcoxon(d) == pytest.approx(expected, rel=1e-9)


def test_signed_rank_test_with_few_ties_counts_all_signs() -> None:
    """Against every one of the 2^12 ways to flip the signs."""
    stats = pytest.importorskip("scipy.stats")
    d = np.array([-3, 1, 2, 2, 5, -1, 4, 4, 3, 1, 5, 2], float)
    ranks = stats.rankdata(np.abs(d))
    flips = np.array(list(itertools.product([0, 1], repeat=len(d))))
    middle = ranks.sum() / 2
    away = np.abs(flips @ ranks - middle)
    expected = (away >= abs(ranks[d > 0].sum() - middle) - 1e-9).mean()
    assert wilcoxon(d) == pytest.approx(expected, rel=1e-9)


def test_signed_rank_test_with_many_ties_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    d = np.random.default_rng(9).integers(-3, 6, 400).astype(float)
    d = d[d != 0] - 0.5 * (np.arange((d != 0).sum()) % 2)
    d = d[d != 0]
    expected = stats.wilcoxon(d, method="asymptotic", correction=True).pvalue
    assert wilcoxon(d) == pytest.approx(expected, rel=1e-9)


def test_no_difference_is_no_evidence() -> None:
    assert wilcoxon([0.0, 0.0, math.nan]) == 1.0
    assert wilcoxon([1.0, -1.0, 2.0, -2.0]) == pytest.approx(1.0)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert corrected == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"x": 0.9, "y": 0.8})["x"] == 1.0


def test_equal_differences_claim_no_more_than_they_can_show() -> None:
    """Five of one sign have p = 2 / 2^5, whether or not their sizes are equal."""
    assert wilcoxon([1, 2, 3, 4, 5]) == pytest.approx(2 / 32)
    assert wilcoxon([1, 1, 1, 1, 1]) == pytest.approx(2 / 32)
