"""Means, intervals and verdicts over seeds: all the statistics that the tables use.

Every interval is a two-sided 95 % interval of Student's t distribution with n - 1 degrees of
freedom, because n, the number of seeds, is small (a normal interval of three runs would be 2.2
times too narrow). It assumes that the values of the seeds are roughly normal; it covers the
randomness of training, not that of the test set (`scripts.reporting.spread`). One run has no
interval.

Two methods are compared by the *paired* difference over the seeds that both have: the same seed
draws the same data order, so part of the noise cancels. Claims of several parts are not corrected
for multiple comparisons: asking that all parts hold is conservative already, but with many parts a
single "not reproduced" may be chance, so the parts are always shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDECIDED)

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """What a set of runs says about one quantity.

    Attributes:
        mean: arithmetic mean (of a ratio: the geometric mean).
        std: sample standard deviation (n - 1); None for one value.
        n: number of values.
        ci95: ends of the 95 % interval of the mean; None for one value.
    """

    mean: float
    std: float | None
    n: int
    ci95: tuple[float, float] | None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval, the number behind ± in tables."""
        return None if self.ci95 is None else (self.ci95[1] - self.ci95[0]) / 2


@dataclass(frozen=True)
class Judgement:
    """A verdict and why it was given.

    Attributes:
        verdict: `REPRODUCED`, `NOT_REPRODUCED` or `UNDECIDED`.
        reason: one clause that a table can print behind the verdict.
    """

    verdict: str
    reason: str


def t_quantile(n: int) -> float:
    """Return the factor of the standard error in a 95 % interval of `n` values.

    Args:
        n: number of values, at least 2.

    Returns:
        The 0.975 quantile of Student's t with n - 1 degrees of freedom (4.303 for n = 3).

    Raises:
        ValueError: `n` is below 2.
    """
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, got n={n}; add seeds")
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))


def summarize(values: Iterable[float]) -> Summary:
    """Return mean, sample standard deviation, n and 95 % interval of `values`.

    Args:
        values: one finite number per seed, at least one.

    Returns:
        The summary; with one value `std` and `ci95` are None.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("cannot summarise zero values; at least one run is needed")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"cannot summarise {numbers}: every value must be finite")
    n = len(numbers)
    mean = math.fsum(numbers) / n
    if n == 1:
        return Summary(mean, None, 1, None)
    std = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (n - 1))
    half = t_quantile(n) * std / math.sqrt(n)
    return Summary(mean, std, n, (mean - half, mean + half))


def paired_difference(
    treatment: Mapping[int, float], control: Mapping[int, float]
) -> Summary | None:
    """Return the summary of ``treatment - control`` over the seeds that both have.

    Args:
        treatment: value by seed of the method that is judged.
        control: value by seed of the method it is compared to, in the same unit.

    Returns:
        The summary, or None where no seed is common.

    Raises:
        ValueError: a value is not finite.
    """
    seeds = sorted(treatment.keys() & control.keys())
    return summarize(treatment[seed] - control[seed] for seed in seeds) if seeds else None


def paired_ratio(treatment: Mapping[int, float], control: Mapping[int, float]) -> Summary | None:
    """Return the summary of ``treatment / control`` over the seeds that both have.

    The interval is taken on the logarithm and mapped back, so it is positive and the ratio of the
    exchanged methods is its exact inverse.

    Args:
        treatment: positive value by seed of the method that is judged (bytes, seconds).
        control: positive value by seed of the method it is compared to, in the same unit.

    Returns:
        Geometric mean ratio with its interval (`std` is that of the logarithm), or None where no
        seed is common.

    Raises:
        ValueError: a value is not positive or not finite.
    """
    seeds = sorted(treatment.keys() & control.keys())
    if not seeds:
        return None
    for name, side in (("treatment", treatment), ("control", control)):
        bad = {seed: side[seed] for seed in seeds if not side[seed] > 0}
        if bad:
            raise ValueError(f"a ratio needs positive values, got {bad} (by seed) in the {name}")
    logs = summarize(math.log(treatment[seed] / control[seed]) for seed in seeds)
    ends = None if logs.ci95 is None else (math.exp(logs.ci95[0]), math.exp(logs.ci95[1]))
    return Summary(math.exp(logs.mean), logs.std, logs.n, ends)


def paired_p_value(treatment: Mapping[int, float], control: Mapping[int, float]) -> float | None:
    """Return the two-sided p value of the paired t test of a difference over common seeds.

    Args:
        treatment: value by seed.
        control: value by seed of what it is compared to, in the same unit.

    Returns:
        The p value; where all differences are the same number, 1 if that is zero, else 0; None with
        fewer than two common seeds.
    """
    difference = paired_difference(treatment, control)
    if difference is None or difference.std is None:
        return None
    error = difference.std / math.sqrt(difference.n)
    if error == 0:
        return float(difference.mean == 0)
    return float(2 * stdtr(difference.n - 1, -abs(difference.mean) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values that are corrected for their number by the step-down method of Holm (1979).

    Where every hypothesis with a corrected value of at most 0.05 is rejected, the chance of even
    one false rejection is at most 5 %, however the tests depend on each other.

    Args:
        p_values: one a hypothesis.

    Returns:
        The corrected values in the same order.
    """
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(p_values, method="holm")[1]]


def judge_difference(difference: Summary | None, *, claims_positive: bool) -> Judgement:
    """Judge a claim about the sign of a paired difference.

    Args:
        difference: what `paired_difference` returned.
        claims_positive: True where the claim says that the difference is above zero, False where
            it says below.

    Returns:
        Reproduced where the whole interval lies strictly on the claim's side of zero, not
        reproduced where it lies strictly on the other side, undecided otherwise and with fewer than
        two common seeds.
    """
    if difference is None or difference.ci95 is None:
        return _too_few(difference)
    low, high = difference.ci95 if claims_positive else (-difference.ci95[1], -difference.ci95[0])
    if low > 0:
        return Judgement(REPRODUCED, "the interval lies on the claim's side of zero")
    if high < 0:
        return Judgement(NOT_REPRODUCED, "the interval lies on the other side of zero")
    return Judgement(UNDECIDED, "the interval contains zero")


def judge_at_most(ratio: Summary | None, *, limit: float) -> Judgement:
    """Judge a claim that a cost is comparable: its ratio to the control is at most `limit`.

    Args:
        ratio: what `paired_ratio` returned.
        limit: largest ratio that still counts as comparable, for example 1.10.

    Returns:
        Reproduced where the whole interval is at most `limit`, not reproduced where all of it is
        above, undecided otherwise and with fewer than two common seeds.

    Raises:
        ValueError: `limit` is not positive.
    """
    if not limit > 0:
        raise ValueError(f"the limit of a ratio must be positive, got {limit}")
    if ratio is None or ratio.ci95 is None:
        return _too_few(ratio)
    if ratio.ci95[1] <= limit:
        return Judgement(REPRODUCED, f"the interval of the ratio is at most {limit:g}")
    if ratio.ci95[0] > limit:
        return Judgement(NOT_REPRODUCED, f"the interval of the ratio is above {limit:g}")
    return Judgement(UNDECIDED, f"the interval of the ratio contains {limit:g}")


def combine(parts: Sequence[Judgement]) -> Judgement:
    """Return the verdict of a claim that holds only if all its parts hold.

    Args:
        parts: one judgement per part, at least one.

    Returns:
        Reproduced if all parts are, not reproduced if any part is not, else undecided.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("a claim needs at least one part to be judged")
    counts = {name: sum(part.verdict == name for part in parts) for name in VERDICTS}
    reason = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    for verdict in (NOT_REPRODUCED, UNDECIDED):
        if counts[verdict]:
            return Judgement(verdict, reason)
    return Judgement(REPRODUCED, reason)


def _too_few(summary: Summary | None) -> Judgement:
    """Return the judgement where there are not two common seeds."""
    n = 0 if summary is None else summary.n
    return Judgement(UNDECIDED, f"needs 2 common seeds, has {n}")
