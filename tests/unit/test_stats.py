"""Means, intervals and verdicts against hand-calculated and scipy's values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from scripts.reporting import stats
from scripts.reporting.stats import NOT_REPRODUCED, REPRODUCED, UNDECIDED, Judgement


def test_summary_of_three_values_by_hand() -> None:
    summary = stats.summarize([1.0, 2.0, 3.0])
    assert (summary.mean, summary.std, summary.n) == (2.0, 1.0, 3)
    # t(0.975, 2 degrees of freedom) = 4.302653, divided by the root of three
    assert summary.half_width == pytest.approx(2.4841377, abs=1e-6)
    assert summary.ci95 == pytest.approx((-0.4841377, 4.4841377), abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_interval_equals_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(70, 2, size=n)
    summary = stats.summarize(values)
    low, high = scipy_stats.t.interval(0.95, n - 1, values.mean(), scipy_stats.sem(values))
    assert summary.ci95 == pytest.approx((low, high), rel=1e-12)
    assert summary.std == pytest.approx(values.std(ddof=1), rel=1e-12)


def test_interval_covers_the_true_mean_in_95_per_cent_of_three_seed_experiments() -> None:
    draws = np.random.default_rng(0).normal(5.0, 1.0, size=(4000, 3))
    covered = 0
    for row in draws:
        interval = stats.summarize(row).ci95
        assert interval is not None
        covered += interval[0] <= 5.0 <= interval[1]
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)


def test_one_value_has_no_interval() -> None:
    summary = stats.summarize([3.5])
    assert (summary.mean, summary.std, summary.n, summary.ci95) == (3.5, None, 1, None)
    assert summary.half_width is None


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_unusable_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot summarise"):
        stats.summarize(values)


def test_quantile_needs_two_values() -> None:
    with pytest.raises(ValueError, match="n=1"):
        stats.t_quantile(1)


def test_difference_is_paired_over_common_seeds() -> None:
    difference = stats.paired_difference({1: 5.0, 2: 7.0, 9: 0.0}, {2: 4.0, 1: 4.0, 3: 8.0})
    assert difference is not None
    assert (difference.mean, difference.n) == (2.0, 2)  # 5 - 4 and 7 - 4
    assert difference.std == pytest.approx(math.sqrt(2))
    assert stats.paired_difference({1: 1.0}, {2: 1.0}) is None


def test_pairing_removes_what_seeds_share() -> None:
    """Seeds that move both methods alike leave a narrow interval of the difference."""
    control = {1: 10.0, 2: 20.0, 3: 30.0}
    treatment = {1: 11.0, 2: 21.1, 3: 30.9}
    difference = stats.paired_difference(treatment, control)
    assert difference is not None
    assert difference.half_width is not None
    assert difference.half_width < 0.3
    assert stats.judge_difference(difference, claims_positive=True).verdict == REPRODUCED


@pytest.mark.parametrize(
    ("values", "claims_positive", "verdict"),
    [
        ([1.0, 1.1, 0.9], True, REPRODUCED),
        ([1.0, 1.1, 0.9], False, NOT_REPRODUCED),
        ([-1.0, -1.1, -0.9], True, NOT_REPRODUCED),
        ([-1.0, -1.1, -0.9], False, REPRODUCED),
        ([1.0, -0.5, 0.7], True, UNDECIDED),
        ([1.0, -0.5, 0.7], False, UNDECIDED),
        ([0.0, 0.0, 0.0], True, UNDECIDED),  # equal to zero is on neither side
        ([1.0], True, UNDECIDED),
    ],
)
def test_verdict_on_a_difference(values: list[float], claims_positive: bool, verdict: str) -> None:
    judgement = stats.judge_difference(stats.summarize(values), claims_positive=claims_positive)
    assert judgement.verdict == verdict


def test_undecided_without_enough_seeds_says_how_many() -> None:
    assert stats.judge_difference(None, claims_positive=True).reason.endswith("has 0")
    one = stats.judge_at_most(stats.summarize([1.0]), limit=1.1)
    assert one == Judgement(UNDECIDED, "needs 2 common seeds, has 1")


def test_ratio_is_geometric_and_its_interval_inverts() -> None:
    a, b = {1: 2.0, 2: 8.0}, {1: 1.0, 2: 1.0}
    ratio, inverse = stats.paired_ratio(a, b), stats.paired_ratio(b, a)
    assert ratio is not None
    assert inverse is not None
    assert ratio.mean == pytest.approx(4.0)
    assert ratio.ci95 is not None
    assert inverse.ci95 == pytest.approx((1 / ratio.ci95[1], 1 / ratio.ci95[0]))
    assert stats.paired_ratio(a, {5: 1.0}) is None


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_ratio_refuses_what_has_no_logarithm(value: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        stats.paired_ratio({1: 1.0}, {1: value})


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.04, 1.05, 1.06], REPRODUCED),
        ([0.5, 0.6, 0.55], REPRODUCED),  # cheaper is comparable, too
        ([1.29, 1.30, 1.31], NOT_REPRODUCED),
        ([1.0, 1.1, 1.2], UNDECIDED),
    ],
)
def test_verdict_on_a_ratio(ratios: list[float], verdict: str) -> None:
    treatment = dict(enumerate(ratios))
    ratio = stats.paired_ratio(treatment, dict.fromkeys(treatment, 1.0))
    assert stats.judge_at_most(ratio, limit=1.10).verdict == verdict


def test_limit_of_a_ratio_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        stats.judge_at_most(None, limit=0.0)


@pytest.mark.parametrize(
    ("verdicts", "overall"),
    [
        ((REPRODUCED, REPRODUCED), REPRODUCED),
        ((REPRODUCED, UNDECIDED), UNDECIDED),
        ((REPRODUCED, UNDECIDED, NOT_REPRODUCED), NOT_REPRODUCED),
    ],
)
def test_a_claim_holds_only_if_all_parts_do(verdicts: tuple[str, ...], overall: str) -> None:
    combined = stats.combine([Judgement(verdict, "") for verdict in verdicts])
    assert combined.verdict == overall
    assert f"1 {verdicts[-1]}" in combined.reason or "2 reproduced" in combined.reason


def test_a_claim_without_parts_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one part"):
        stats.combine([])
