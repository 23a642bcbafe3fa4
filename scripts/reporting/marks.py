"""Which row of a column is best, and which cannot be told from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scripts.reporting import stats

BEST, TIED = "best", "tied"


def mark_best(values: Sequence[Mapping[int, float]], sign: int) -> list[str | None]:
    """Return the mark of each row in one column.

    The best mean is `BEST`. A row is `TIED` where the interval of its paired difference to the best
    contains zero: over the seeds that both have, at least two.

    Args:
        values: by row, the value of each seed; empty where there is none.
        sign: +1 where higher is better, -1 where lower is, 0 where neither: nothing is marked.
    """
    marks: list[str | None] = [None] * len(values)
    means = {i: stats.summarize(v.values()).mean for i, v in enumerate(values) if v}
    if not means or sign == 0:
        return marks
    best = max(means, key=lambda i: sign * means[i])
    for i in means:
        difference = stats.paired_difference(values[i], values[best])
        if i == best:
            marks[i] = BEST
        elif difference is not None and difference.ci95 is not None:
            low, high = difference.ci95
            marks[i] = TIED if low <= 0 <= high else None
    return marks
