"""What the sections of the audit share: their form, and numbers in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.reporting import stats

Content = Mapping[str, Any]
Record = Mapping[str, Any]


@dataclass
class Section:
    """One question and its answer.

    Attributes:
        key: name of its picture is ``audit_<key>``.
        title: the question in a few words.
        asked: what was asked.
        findings: sentences; the first is repeated on top of the page.
        head: of the table.
        rows: of the table.
        measured_on: what it was measured on.
        not_shown: what it does not show.
        picture: data of the picture.
    """

    key: str
    title: str
    asked: str
    findings: list[str]
    head: list[str]
    rows: list[list[str]]
    measured_on: str
    not_shown: str
    picture: dict[str, Any] = field(default_factory=dict)


def number(value: float) -> str:
    """Return a measured number with two significant digits."""
    if value == 0:
        return "0"
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 else f"{value:.1e}".replace("e-0", "e-")


def span(values: Iterable[float], form: str = "{:g}") -> str:
    """Return ``4`` or ``3 to 4``."""
    found = sorted(values)
    low, high = form.format(found[0]), form.format(found[-1])
    return low if low == high else f"{low} to {high}"


def listing(names: Sequence[str]) -> str:
    """Return names as a list in words, or ``none``."""
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def interval(summary: stats.Summary) -> str:
    """Return mean and interval, with the sign."""
    if summary.ci95 is None:
        return f"{summary.mean:+.2f}, one seed"
    return f"{summary.mean:+.2f} [{summary.ci95[0]:+.2f}, {summary.ci95[1]:+.2f}]"


def direction(summary: stats.Summary) -> str:
    """Return ``above``, ``below`` or ``not distinguishable`` from the interval of a difference.

    One seed has no interval: ``not judged``.
    """
    if summary.ci95 is None:
        return "not judged"
    if summary.ci95[0] <= 0 <= summary.ci95[1]:
        return "not distinguishable"
    return "above" if summary.mean > 0 else "below"
