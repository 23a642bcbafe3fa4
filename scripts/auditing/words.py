"""What the sections of the audit share: their form, and numbers in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.auditing.limits import Judged

Content = Mapping[str, Any]
Record = Mapping[str, Any]
#: more figures near a limit are counted, fewer are named.
MOST_NAMED = 3


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


def setting(value: float) -> str:
    """Return a number that was chosen, as it was chosen."""
    return f"{value:g}".replace("e-0", "e-")


def percent(share: float, form: str = ".0f") -> str:
    """Return a share in percent."""
    return f"{100 * share:{form}} %"


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


def near(judged: Judged | None) -> str:
    """Return a note with the figure and its limit where they are near, else nothing."""
    if judged is None or not judged.is_near:
        return ""
    return f" (near the limit: {number(judged.value)} against {limit_of(judged)})"


def near_among(by_name: Mapping[str, Judged]) -> str:
    """Return a note with those of several figures that are near their common limit, or nothing."""
    close = {name: judged for name, judged in by_name.items() if judged.is_near}
    if not close:
        return ""
    limit = limit_of(next(iter(close.values())))
    if len(close) > MOST_NAMED:
        values = sorted(judged.value for judged in close.values())
        count = "all" if len(close) == len(by_name) else f"{len(close)} of"
        said = f"{count} {len(by_name)}, {number(values[0])} to {number(values[-1])}"
    else:
        said = listing([f"{name} {number(judged.value)}" for name, judged in close.items()])
    return f" (near the limit: {said} against {limit})"


def limit_of(judged: Judged) -> str:
    """Return a limit with at most two digits: a tolerance that was computed has many."""
    return f"{judged.limit:.2g}".replace("e-0", "e-")
