"""Figures against limits, and what would fall on the other side of a limit after a small change.

A figure that lies near its limit can change sides with the processor, the version of a library or
the seed. Every comparison of the audit is made here, so that every one says whether it was close.
How near is near stands beside each limit in ``configs/audit``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Judged:
    """A figure and its limit.

    Attributes:
        value: the figure.
        limit: what it is compared with.
        is_near: whether the figure could lie on the other side as easily.
    """

    value: float
    limit: float
    is_near: bool

    @property
    def is_below(self) -> bool:
        """Whether the figure is smaller than the limit."""
        return self.value < self.limit

    @property
    def is_above(self) -> bool:
        """Whether the figure is larger than the limit."""
        return self.value > self.limit


def judge(value: float, limit: float, near_factor: float) -> Judged:
    """Compare a positive figure that varies by factors (an error, a distance).

    Args:
        value: at least 0.
        limit: above 0.
        near_factor: the figure is near the limit if either is at most so many times the other.
    """
    is_near = limit / near_factor <= value <= limit * near_factor
    return Judged(value, limit, is_near)


def judge_distance(value: float, expected: float, limit: float, near_share: float) -> Judged:
    """Compare the distance of a figure from an expected one.

    Args:
        value: the figure.
        expected: what it should be.
        limit: the distance that is allowed.
        near_share: the distance is near the limit if it changes sides when the figure changes by
            this share of itself.
    """
    distance = abs(value - expected)
    moved = (abs(value * (1 + sign * near_share) - expected) for sign in (-1, 1))
    return Judged(distance, limit, any((d <= limit) != (distance <= limit) for d in moved))


def nearest(judged: Iterable[Judged]) -> Judged | None:
    """Return the figure that is near its limit and nearest to it, by factor; None: none is near."""
    near = [j for j in judged if j.is_near]
    return min(near, key=lambda j: max(j.value, j.limit) / min(j.value, j.limit), default=None)
