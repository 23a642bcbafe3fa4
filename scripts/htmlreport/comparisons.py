"""What a table says of each row: its scores, and how they differ from those of LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.reporting import stats
from scripts.reporting.marks import mark_best

Content = Mapping[str, Any]

#: the row that all others are compared to.
BASE = "lora"
BETTER, WORSE, NOT_TOLD, TOO_FEW = "better", "worse", "not distinguishable", "too few seeds"


@dataclass(frozen=True)
class Difference:
    """How a row differs from LoRA in one column, in the units of the table.

    Attributes:
        mean: of the paired differences; None where no seed is common.
        low: lower end of the 95 % interval; None for fewer than two seeds.
        high: its upper end.
        n: number of common seeds.
        paper: the paper's difference; None where it does not give both numbers.
        reading: `BETTER`, `WORSE`, `NOT_TOLD` or `TOO_FEW`, by the interval.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    paper: float | None
    reading: str


@dataclass(frozen=True)
class Score:
    """A row's score in one column, in the units of the table.

    Attributes:
        mean: over seeds; None where there is none.
        half: half of the 95 % interval; None for fewer than two seeds.
        n: number of seeds.
        paper: the paper's number; None where it gives none.
        status: how the paper's number is known (text, derived, recalled); None without one.
        mark: ``best``, ``tied`` (not distinguishable from the best) or None.
        missing: why a finished run has no score.
    """

    mean: float | None
    half: float | None
    n: int
    paper: float | None
    status: str | None
    mark: str | None
    missing: tuple[str, ...]


def by_seed(cell: Content) -> dict[int, float]:
    """Return the values of a cell of a table by seed."""
    return {int(seed): float(value) for seed, value in cell["values"].items()}


def scores_of(rows: Sequence[Content], column: Content) -> list[Score]:
    """Return the score of every row in `column` (of a table's ``column_specs``)."""
    cells = [row["metrics"][column["name"]] for row in rows]
    marks = mark_best([by_seed(cell) for cell in cells], _sign(column))
    found = []
    for row, cell, mark in zip(rows, cells, marks, strict=True):
        ends, paper = cell["ci95"], row["paper"].get(column["name"])
        found.append(
            Score(
                mean=cell["mean"],
                half=None if ends is None else (ends[1] - ends[0]) / 2,
                n=cell["n"],
                paper=None if paper is None else float(paper["value"]),
                status=None if paper is None else paper["status"],
                mark=mark,
                missing=tuple(cell["missing"]),
            )
        )
    return found


def stated_differences(claims: Sequence[Content]) -> dict[tuple[str, str], float]:
    """Return the paper's differences to LoRA that claims state, by row and column."""
    return {
        (part["row"], part["column"]): float(part["paper_difference"])
        for claim in claims
        for part in claim["parts"]
        if part["against"] == BASE and part["paper_difference"] is not None
    }


def differences_of(
    rows: Sequence[Content], column: Content, stated: Mapping[tuple[str, str], float]
) -> list[Difference | None]:
    """Return how every row differs from LoRA in one column; None for LoRA, and without it.

    Args:
        rows: of a table.
        column: of its ``column_specs``.
        stated: from `stated_differences`, for rows of which the paper gives no two numbers.
    """
    base = next((row for row in rows if row["method"] == BASE), None)
    if base is None:
        return [None] * len(rows)
    return [None if row is base else _difference(row, base, column, stated) for row in rows]


def _difference(
    row: Content, base: Content, column: Content, stated: Mapping[tuple[str, str], float]
) -> Difference:
    name = column["name"]
    found = stats.paired_difference(by_seed(row["metrics"][name]), by_seed(base["metrics"][name]))
    papers = [side["paper"].get(name) for side in (row, base)]
    if None in papers:
        paper = stated.get((row["method"], name))
    else:
        paper = float(papers[0]["value"]) - float(papers[1]["value"])
    if found is None:
        return Difference(None, None, None, 0, paper, TOO_FEW)
    low, high = found.ci95 if found.ci95 is not None else (None, None)
    return Difference(found.mean, low, high, found.n, paper, _reading(low, high, _sign(column)))


def _reading(low: float | None, high: float | None, sign: int) -> str:
    if low is None or high is None:
        return TOO_FEW
    if low <= 0 <= high:
        return NOT_TOLD
    return BETTER if (low > 0) == (sign > 0) else WORSE


def _sign(column: Content) -> int:
    return 1 if column["better"] == "higher" else -1


def signed(value: float | None, decimals: int) -> str:
    """Return a number with its sign, the minus as in print; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:+.{decimals}f}"
    if float(text) == 0:
        return f"{0:.{decimals}f}"
    return text.replace("-", "−")


def number(value: float | None, decimals: int) -> str:
    """Return a number, the minus as in print; a dash for None."""
    return "–" if value is None else f"{value:.{decimals}f}".replace("-", "−")
